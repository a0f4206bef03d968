//! ELF images, the auxiliary vector and the initial stack.
