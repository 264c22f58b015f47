//! `lifeboat`: the operator's command. Asks the site controller on this machine and shows what it says.

use anyhow::Context;
use clap::{Parser, Subcommand};
use lifeboat::local_api::{Client, ClientError};
use lifeboat_site_controller::{
    api::types::{
        FailoverPreview, FailoverRequest, PointList, PrunePreview, PruneReport, Released, SiteStatus,
        VerifyLine, VerifyRequest, VmRow,
    },
    console::{tables, watch::Display},
    failover::{
        progress::{FailoverReport, Progress},
        runbook::LATEST,
    },
    verify::VerifyReport,
};
use serde::Serialize;
use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Look at recovery points, check them, and fail VMs over to this site.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
EXAMPLES
  lifeboat status
  lifeboat points web
  lifeboat failover web --emergency
  lifeboat failover web --emergency --point '5m ago' --yes
  lifeboat verify web --json
  lifeboat prune web --dry-run

EXIT CODES
  0  done    1  not done; the reason is on stderr    2  wrong usage    3  verify found damage"
)]
struct Arguments {
    /// The site controller's socket.
    #[arg(long, global = true, env = "LIFEBOAT_SOCKET", default_value = "/run/lifeboat-site/api.sock")]
    socket: PathBuf,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the site and every VM that is protected to it.
    Status,
    /// List the recovery points of a VM.
    Points {
        /// Name or UUID.
        vm: String,
    },
    /// Bring a VM back at this site from a recovery point.
    ///
    /// Run it again if it was interrupted: it goes on from the last step that was completed.
    Failover {
        /// Name or UUID.
        vm: String,
        /// The source is lost (the only kind of failover in this release).
        #[arg(long, required = true)]
        emergency: bool,
        /// Which point: `latest`, the beginning of an id, or a time (`2026-01-31T12:00:00Z`, `12:00:00` today, `5m ago`): the
        /// newest point at or before it.
        #[arg(long, default_value = LATEST)]
        point: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Take away at once the points of a VM that no rule keeps (`keep` in site.toml), and fold what is left.
    ///
    /// The controller does this by itself, in its own time. What is taken away can't be brought back.
    Prune {
        /// Name or UUID.
        vm: String,
        /// Only show what would go.
        #[arg(long)]
        dry_run: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Let another host's agent go on with a VM's history, where nothing shows that the guest moved there.
    ///
    /// Needed after a guest was started elsewhere other than by a live migration: its host is lost, say. Make sure that no
    /// other copy of it runs.
    Release {
        /// Name or UUID.
        vm: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Read and hash everything again that is stored, and say what is damaged.
    Verify {
        /// Name or UUID; all VMs where it is left out.
        vm: Option<String>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lifeboat: {error:#}");
            if let Some(hint) = error.downcast_ref::<ClientError>().and_then(|e| e.hint()) {
                eprintln!("  {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.socket, "lifeboat-site-controller");
    let json = arguments.json;
    match arguments.command {
        Command::Status => {
            let status: SiteStatus = client.get("/v1/status").await?;
            print(json, &status, tables::status)?;
        }
        Command::Points { vm } => {
            let list: PointList = client.get(&format!("/v1/vms/{}/points", path_segment(&vm))).await?;
            print(json, &list, tables::points)?;
        }
        Command::Failover { vm, emergency: _, point, yes } => {
            let request = FailoverRequest { vm, point };
            if !yes {
                let preview: FailoverPreview = client.post("/v1/failovers/preview", &request).await?;
                confirm(&tables::preview(&preview), &preview.name)?;
            }
            let report = fail_over(&client, request, json).await?;
            print(json, &report, tables::failover)?;
        }
        Command::Prune { vm, dry_run, yes } => {
            let path = format!("/v1/vms/{}/prune", path_segment(&vm));
            if dry_run || !yes {
                let preview: PrunePreview = client.get(&path).await?;
                if dry_run {
                    print(json, &preview, tables::prune_preview)?;
                    return Ok(ExitCode::SUCCESS);
                }
                confirm(&tables::prune_preview(&preview), &preview.name)?;
            }
            let report: PruneReport = client.post(&path, &()).await?;
            print(json, &report, tables::prune)?;
        }
        Command::Release { vm, yes } => {
            if !yes {
                let status: SiteStatus = client.get("/v1/status").await?;
                let is_meant = |row: &&VmRow| row.name == vm || row.vm.to_string() == vm;
                // One that is not known is refused by the site in its own words.
                if let Some(row) = status.vms.iter().find(is_meant) {
                    confirm(&tables::release_preview(row), &row.name)?;
                }
            }
            let path = format!("/v1/vms/{}/release", path_segment(&vm));
            let released: Released = client.post(&path, &()).await?;
            print(json, &released, tables::released)?;
        }
        Command::Verify { vm } => {
            let report = verify(&client, VerifyRequest { vm }, json).await?;
            print(json, &report, tables::verify)?;
            if !report.is_clean() {
                return Ok(ExitCode::from(3));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print<T: Serialize>(json: bool, value: &T, show: impl Fn(&T) -> String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(value)? + "\n" } else { show(value) };
    // A pager that was closed is no failure of ours.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn confirm(preview: &str, name: &str) -> anyhow::Result<()> {
    eprint!("{preview}");
    anyhow::ensure!(
        io::stdin().is_terminal(),
        "not confirmed: there is no terminal to ask on; give --yes if you are sure"
    );
    eprint!("Type the VM's name to go on: ");
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    anyhow::ensure!(line.trim() == name, "not confirmed; nothing was changed");
    Ok(())
}

async fn fail_over(client: &Client, request: FailoverRequest, json: bool) -> anyhow::Result<FailoverReport> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, Progress>("/v1/failovers", &request).await?;
    loop {
        let progress = match lines.next().await {
            Ok(Some(progress)) => progress,
            Ok(None) | Err(ClientError::BrokenOff { .. }) => break,
            Err(error) => return Err(error.into()),
        };
        match progress {
            Progress::Step { step } => display.step(&step),
            Progress::Bytes { step, done, total } => display.bytes(&step, done, total),
            Progress::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!(
        "the site controller went away in the middle of the failover; once it runs again, run the same command again: it \
         goes on from the last step that was completed"
    )
}

async fn verify(client: &Client, request: VerifyRequest, json: bool) -> anyhow::Result<VerifyReport> {
    let mut display = Display::new(json);
    let mut lines = client.post_stream::<_, VerifyLine>("/v1/verify", &request).await?;
    while let Some(line) = lines.next().await.context("verifying")? {
        match line {
            VerifyLine::Progress { done_bytes, total_bytes } => {
                display.bytes("verifying", done_bytes, total_bytes)
            }
            VerifyLine::Done { report } => {
                display.finish();
                return Ok(report);
            }
        }
    }
    anyhow::bail!("the site controller went away before it was done; run it again")
}

/// A name as one segment of a path.
fn path_segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
