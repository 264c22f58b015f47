//! `make demo`: a running VM is protected, its site loses power, and it goes on at the other site.
//! Prints one screen for people, writes `<target>/demo/report.json`, and ends with a code that is not zero unless the
//! guest went on unharmed. Reading order: [`play`] is what happens, [`life`] its second act, [`judge`] what that means,
//! [`story`] what is kept of it, [`screen`] how it is told.

mod host;
mod interrupt;
mod judge;
mod life;
mod play;
mod screen;
mod story;
mod witness;

use anyhow::{Context, Result};
use std::{fs, path::PathBuf, process::ExitCode};
use story::Story;

fn main() -> ExitCode {
    match demonstrate() {
        Ok(story) if story.unharmed => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            interrupt::wait_if_interrupted();
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Everything is taken down before the screen is printed, so that it is the last thing on the terminal.
fn demonstrate() -> Result<Story> {
    let story = play::play()?;
    let report = write_report(&story)?;
    interrupt::wait_if_interrupted();
    print!("{}", screen::render(&story, &report));
    Ok(story)
}

fn write_report(story: &Story) -> Result<PathBuf> {
    let folder = rig::target_dir()?.join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("report.json");
    fs::write(&path, serde_json::to_vec_pretty(story)?)
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}
