//! The guest's own agent (qemu-guest-agent): what is asked of it, and what may be made of its answers.
//! Promises: every question has a limit of time and of size; whatever a guest answers is an answer or an error, never a
//! panic. A guest may lie: nothing that must hold may rest on what is heard here. Blocking. Called by the site after a
//! replica was resumed, by the agent around a cut; asked through libvirt, or in tests through a plain socket.

mod interfaces;

pub use interfaces::Interface;

use crate::units::UnixMs;
use serde_json::{Value, json};
use std::{
    thread,
    time::{Duration, Instant},
};

/// The name of the channel by which an agent in the guest is reached.
pub const CHANNEL: &str = "org.qemu.guest_agent.0";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// Nothing is known of whether it was done.
    #[error("the guest agent did not answer `{command}`: {why}")]
    Silent { command: &'static str, why: String },
    #[error("the guest agent refused `{command}`: {why}")]
    Refused { command: &'static str, why: String },
    #[error("the guest agent answered `{command}` with something unexpected")]
    Unexpected { command: &'static str },
    #[error("`{program}` did not end in the guest within {} s", within.as_secs())]
    Unfinished { program: String, within: Duration },
}

/// What carries a question to the agent and its answer back: one line of JSON each.
pub trait AgentChannel {
    fn ask(&self, request: &str, within: Duration) -> Result<String, String>;
}

/// How a program in the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramEnd {
    Exited(i64),
    Killed(i64),
}

/// The agent of one guest.
pub struct GuestAgent<C> {
    channel: C,
}

impl<C: AgentChannel> GuestAgent<C> {
    pub fn new(channel: C) -> Self {
        Self { channel }
    }

    /// Whether it is there, by its answer.
    pub fn ping(&self, within: Duration) -> Result<(), AgentError> {
        self.call("guest-ping", json!({}), within).map(drop)
    }

    /// Sets the guest's clock, and its RTC with it.
    pub fn set_time(&self, to: UnixMs) -> Result<(), AgentError> {
        let nanoseconds = to.0.saturating_mul(1_000_000);
        self.call("guest-set-time", json!({ "time": nanoseconds }), ANSWER_WITHIN).map(drop)
    }

    /// What the guest's clock shows.
    pub fn time(&self) -> Result<UnixMs, AgentError> {
        let command = "guest-get-time";
        let answer = self.call(command, json!({}), ANSWER_WITHIN)?;
        answer.as_u64().map(|ns| UnixMs(ns / 1_000_000)).ok_or(AgentError::Unexpected { command })
    }

    /// Whether file systems are frozen.
    pub fn is_frozen(&self) -> Result<bool, AgentError> {
        let command = "guest-fsfreeze-status";
        match self.call(command, json!({}), ANSWER_WITHIN)?.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            Some(_) | None => Err(AgentError::Unexpected { command }),
        }
    }

    /// Freezes all file systems that can be, which makes whoever writes to them wait; returns how many. Where `within` is
    /// over, they may be frozen all the same, or will be.
    pub fn freeze(&self, within: Duration) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-freeze", within)
    }

    /// Thaws whatever is frozen; returns how many were.
    pub fn thaw(&self) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-thaw", ANSWER_WITHIN)
    }

    /// Its network interfaces, with their addresses.
    pub fn interfaces(&self) -> Result<Vec<Interface>, AgentError> {
        let command = "guest-network-get-interfaces";
        let answer = self.call(command, json!({}), ANSWER_WITHIN)?;
        interfaces::read(&answer).ok_or(AgentError::Unexpected { command })
    }

    /// Whether it says that it runs on Windows. One that is too old to say is taken for no.
    pub fn is_windows(&self) -> Result<bool, AgentError> {
        match self.call("guest-get-osinfo", json!({}), ANSWER_WITHIN) {
            Ok(answer) => Ok(answer.get("id").and_then(Value::as_str) == Some("mswindows")),
            Err(AgentError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn count(&self, command: &'static str, within: Duration) -> Result<u64, AgentError> {
        self.call(command, json!({}), within)?.as_u64().ok_or(AgentError::Unexpected { command })
    }

    /// Runs a program in the guest, and waits for its end. One that takes longer is left running.
    pub fn run(
        &self,
        program: &str,
        arguments: &[String],
        within: Duration,
    ) -> Result<ProgramEnd, AgentError> {
        let until = Instant::now() + within;
        let command = "guest-exec";
        let begun = self.call(command, json!({ "path": program, "arg": arguments }), ANSWER_WITHIN)?;
        let pid = begun.get("pid").and_then(Value::as_i64).ok_or(AgentError::Unexpected { command })?;
        let mut pause = POLL_FIRST;
        loop {
            let command = "guest-exec-status";
            let status = self.call(command, json!({ "pid": pid }), ANSWER_WITHIN)?;
            let number = |key: &str| status.get(key).and_then(Value::as_i64);
            match status.get("exited").and_then(Value::as_bool) {
                Some(true) => {
                    let end = number("exitcode").map(ProgramEnd::Exited);
                    let end = end.or_else(|| number("signal").map(ProgramEnd::Killed));
                    return end.ok_or(AgentError::Unexpected { command });
                }
                Some(false) if Instant::now() < until => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(POLL_MAX);
                }
                Some(false) => return Err(AgentError::Unfinished { program: program.to_owned(), within }),
                None => return Err(AgentError::Unexpected { command }),
            }
        }
    }

    fn call(&self, command: &'static str, arguments: Value, within: Duration) -> Result<Value, AgentError> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        let answer = self.channel.ask(&request.to_string(), within);
        let answer = answer.map_err(|why| AgentError::Silent { command, why })?;
        read_answer(command, &answer)
    }
}

fn read_answer(command: &'static str, answer: &str) -> Result<Value, AgentError> {
    let unexpected = AgentError::Unexpected { command };
    if answer.len() > ANSWER_MAX {
        return Err(unexpected);
    }
    let Ok(mut answer) = serde_json::from_str::<Value>(answer) else { return Err(unexpected) };
    if let Some(error) = answer.get("error") {
        let why = error.get("desc").and_then(Value::as_str).unwrap_or("(no words)");
        // A guest's words end in an operator's terminal.
        let why = why.chars().filter(|letter| !letter.is_control()).take(WORDS_MAX).collect();
        return Err(AgentError::Refused { command, why });
    }
    answer.get_mut("return").map(Value::take).ok_or(unexpected)
}

/// What an agent at work takes for an answer, with much to spare.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_MAX: usize = 1 << 20;
const WORDS_MAX: usize = 300;
const POLL_FIRST: Duration = Duration::from_millis(20);
const POLL_MAX: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
