//! Commands of the operator's that run at this site before and after the replicas start.
//! Promises: one takes no longer than its limit, and no more than a few KiB of what it says are kept. Called by `group`.

use std::{process::Stdio, time::Duration};
use tokio::process::Command;

/// What is kept of a command's words.
const SAID_MAX: usize = 4096;

/// Runs `command` with `env` besides the daemon's own; the error is what to tell the operator.
pub async fn run(command: &[String], env: &[(&str, String)], limit: Duration) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let mut child = Command::new(program);
    child.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    for variable in lifeboat::fault::VARIABLES {
        child.env_remove(variable);
    }
    child.envs(env.iter().map(|(name, value)| (*name, value.as_str())));
    let ended = tokio::time::timeout(limit, child.output()).await;
    let ended = ended.map_err(|_| format!("`{program}` took longer than {} s", limit.as_secs()))?;
    let ended = ended.map_err(|error| format!("`{program}` could not be started: {error}"))?;
    let said = [ended.stdout.as_slice(), ended.stderr.as_slice()].concat();
    let said = String::from_utf8_lossy(&said[..said.len().min(SAID_MAX)]).trim().to_owned();
    tracing::info!(%program, status = %ended.status, %said, "script of a failover");
    if ended.status.success() { Ok(()) } else { Err(format!("`{program}`: {}: {said}", ended.status)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_script_knows_what_it_is_run_for_and_is_ended_when_its_time_is_over() {
        let sh = |text: &str| ["sh", "-c", text].map(str::to_owned);
        let env = [("LIFEBOAT_GROUP", "shop".to_owned())];
        let long = Duration::from_secs(60);
        assert_eq!(run(&sh("test $LIFEBOAT_GROUP = shop"), &env, long).await, Ok(()));
        assert!(run(&sh("echo no room; exit 3"), &env, long).await.unwrap_err().contains("no room"));
        let late = run(&sh("sleep 1000"), &env, Duration::from_millis(50)).await;
        assert!(late.unwrap_err().contains("longer"));
        assert!(run(&["/nonexistent".to_owned()], &env, long).await.is_err());
    }
}
