//! QEMU's monitor (QMP) of one running guest, as a trait: libvirt's passthrough in the product, a plain socket in tests.
//! Promises: every call blocks and is bounded by the transport's own timeout; call it from a blocking thread.
//! An error from QEMU keeps QEMU's class and words.

use serde_json::{Value, json};
use std::os::fd::BorrowedFd;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MonitorError {
    /// QEMU understood and refused. `class` and `reason` are QEMU's own.
    #[error("QEMU refused `{command}`: {reason}")]
    Refused { command: String, class: String, reason: String },
    /// The guest is gone or libvirt can't reach it: nothing is known of what happened.
    #[error("`{command}` could not be asked of QEMU: {reason}")]
    Unreachable { command: String, reason: String },
    /// An answer came, but not of the form that QEMU's schema promises.
    #[error("QEMU answered `{command}` with something unexpected: {what}")]
    Unexpected { command: String, what: String },
}

/// One guest's monitor.
pub trait Monitor: Send + Sync {
    /// Runs one QMP command with file descriptors passed beside it (for `getfd` and `add-fd`); returns its `return` value.
    fn execute_with_fds(
        &self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, MonitorError>;

    fn execute(&self, command: &str, arguments: Value) -> Result<Value, MonitorError> {
        self.execute_with_fds(command, arguments, &[])
    }

    /// Runs a human-monitor command and returns what it prints.
    fn human(&self, line: &str) -> Result<String, MonitorError> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        answer.as_str().map(str::to_owned).ok_or_else(|| MonitorError::Unexpected {
            command: format!("human-monitor-command {line}"),
            what: answer.to_string(),
        })
    }
}

/// Reads a raw QMP reply: its `return` value, or its error as [`MonitorError::Refused`].
pub fn read_reply(command: &str, reply: &str) -> Result<Value, MonitorError> {
    let unexpected = |what: &str| MonitorError::Unexpected { command: command.into(), what: what.into() };
    let mut reply: Value = serde_json::from_str(reply).map_err(|error| unexpected(&error.to_string()))?;
    if let Some(error) = reply.get("error") {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("(no words)").to_owned();
        return Err(MonitorError::Refused {
            command: command.into(),
            class: text("class"),
            reason: text("desc"),
        });
    }
    reply.get_mut("return").map(Value::take).ok_or_else(|| unexpected("no `return`"))
}
