//! An operator's command that ends the source for sure, before its replica starts: a power switch, a cloud's API.
//! Promises: it is done only when the command has ended with exit code 0 in time; it may be run more than once. No shell is in
//! between, and what it prints is logged. Called by `steps`, which starts no replica before.

use std::{process::Stdio, time::Duration};
use tokio::process::Command;

/// How to stop a source, if there is a command for it; `{vm}`, `{uuid}` and `{agent}` stand for what they say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stonith {
    pub command: Vec<String>,
    pub limit: Duration,
}

#[derive(Debug, thiserror::Error)]
#[error(
    "`fence_command` {why}: the source may still run, and nothing was started. Mend it and run the failover again; if you \
     know that the source is off, with `--skip-fence-command`"
)]
pub struct StonithError {
    why: String,
}

impl Stonith {
    /// Ends the source of this VM. `agent` protected it last.
    pub async fn run(&self, vm: &str, uuid: &str, agent: &str) -> Result<(), StonithError> {
        let fill = |word: &String| word.replace("{vm}", vm).replace("{uuid}", uuid).replace("{agent}", agent);
        let words: Vec<String> = self.command.iter().map(fill).collect();
        let failed = |why: String| StonithError { why };
        let Some((program, arguments)) = words.split_first() else { return Ok(()) };
        tracing::info!(?words, "stopping the source");
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        let ended = tokio::time::timeout(self.limit, command.output()).await;
        let output = match ended {
            Ok(output) => output.map_err(|error| failed(format!("could not be run ({error})")))?,
            Err(_) => return Err(failed(format!("did not end within {} s", self.limit.as_secs()))),
        };
        let said = [&output.stdout, &output.stderr].map(|said| excerpt(said));
        tracing::info!(status = %output.status, stdout = said[0], stderr = said[1], "fence_command has ended");
        if output.status.success() {
            return Ok(());
        }
        let words = said.iter().rev().find(|said| !said.is_empty()).cloned().unwrap_or_default();
        Err(failed(format!("ended with {} ({words})", output.status)))
    }
}

/// The end of what was said.
fn excerpt(said: &[u8]) -> String {
    let from = said.len().saturating_sub(SAID_MAX);
    String::from_utf8_lossy(&said[from..]).trim().escape_debug().to_string()
}

const SAID_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    fn stonith(words: &[&str], limit_ms: u64) -> Stonith {
        let command = words.iter().map(|word| (*word).to_owned()).collect();
        Stonith { command, limit: Duration::from_millis(limit_ms) }
    }

    #[tokio::test]
    async fn a_fence_command_counts_only_when_it_ends_well_and_in_time() {
        let long = 60_000;
        let test = ["test", "{vm}/{agent} {uuid}", "=", "web; true/host-1 u"];
        stonith(&test, long).run("web; true", "u", "host-1").await.unwrap();
        for (words, limit, expected) in [
            (vec!["sh", "-c", "echo no power >&2; exit 3"], long, "no power"),
            (vec!["sleep", "60"], 50, "did not end within"),
            (vec!["/no/such/program"], long, "could not be run"),
        ] {
            let error = stonith(&words, limit).run("web", "u", "a").await.unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("--skip-fence-command"), "{error}");
        }
    }
}
