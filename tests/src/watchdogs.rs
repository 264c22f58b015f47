//! The processes that watch over an agent, as the host sees them. Called by the tests that take them away.

use std::fs;

use anyhow::Result;
use nix::unistd::Pid;

use crate::product::Agent;

impl Agent {
    /// Processes that watch over it.
    pub fn watchdogs(&mut self) -> Result<Vec<Pid>> {
        let pid = self.process()?.pid_in_host()?;
        let mut found = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let children = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
                if name.trim() == "lifeboat-wdog" {
                    found.push(Pid::from_raw(child.parse()?));
                }
            }
        }
        Ok(found)
    }
}
