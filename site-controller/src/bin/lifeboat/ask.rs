//! What all commands share: whom to ask, how to print, and the question before something that can't be undone.

use lifeboat::local_api::Client;
use serde::Serialize;
use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

/// The site that is asked, and how its answers are shown.
pub struct Site {
    pub client: Client,
    /// Print JSON.
    pub json: bool,
}

/// What a command that did its work ends with.
pub type Ended = anyhow::Result<ExitCode>;

impl Site {
    /// Prints an answer, as JSON or as `show` puts it.
    pub fn print<T: Serialize>(&self, value: &T, show: impl Fn(&T) -> String) -> Ended {
        let text = if self.json { serde_json::to_string_pretty(value)? + "\n" } else { show(value) };
        match io::stdout().write_all(text.as_bytes()) {
            // A pager that was closed is no failure of ours.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            other => Ok(other.map(|()| ExitCode::SUCCESS)?),
        }
    }
}

/// Shows what would happen, and has `name` typed; an error where it is not.
pub fn confirm(preview: &str, what: &str, name: &str) -> anyhow::Result<()> {
    eprint!("{preview}");
    anyhow::ensure!(
        io::stdin().is_terminal(),
        "not confirmed: there is no terminal to ask on; give --yes if you are sure"
    );
    eprint!("Type {what} to go on: ");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    anyhow::ensure!(line.trim() == name, "not confirmed; nothing was changed");
    Ok(())
}

/// A name as one segment of a path.
pub fn path_segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
