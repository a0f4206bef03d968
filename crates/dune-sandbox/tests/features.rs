//! Memory, views of oneself and refusals in the sandbox, with the engine on host, compared
//! with their native runs.

mod tasks;

fn main() -> std::process::ExitCode {
    tasks::role().unwrap_or_else(|| tasks::on_host(tasks::features::SCENARIOS))
}
