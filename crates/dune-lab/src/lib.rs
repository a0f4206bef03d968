//! The lab: a bundled virtual machine in which ring 0 runs on any host.
