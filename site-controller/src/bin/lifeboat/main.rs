//! `lifeboat`: the operator's command. Asks the site controller, on this machine or elsewhere, and shows what it says.
//! Each family of commands has a file of its own, with its arguments and its `run`; [`ask`] is what they share.

mod apply;
mod ask;
mod audit;
mod check;
mod door;
mod drill;
mod failback;
mod failover;
mod group;
mod handover;
mod peer;
mod points;
mod release;
mod replicas;
mod report;
mod reprotect;
mod seed;
mod status;
mod token;
mod undo;
mod verify;

use ask::Site;
use clap::{Parser, Subcommand};
use lifeboat::local_api::ClientError;
use std::process::ExitCode;

/// Look at recovery points, check them, and fail VMs over to this site.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
EXAMPLES
  lifeboat status
  lifeboat group create shop --vm web --vm db --rpo 5s
  lifeboat check shop
  lifeboat points web
  lifeboat failover web --emergency
  lifeboat failover web --emergency --point '5m ago' --yes
  lifeboat drill shop
  lifeboat report shop --since 30d --out /var/tmp/audit
  lifeboat verify web --json
  lifeboat prune web --dry-run
  lifeboat --api https://dr.example.com:7444 --token-file ~/.lifeboat-token status

EXIT CODES
  0  done    1  not done; the reason is on stderr    2  wrong usage    3  verify found damage
  4  check: degraded    5  check: a failover would not work"
)]
struct Arguments {
    #[command(flatten)]
    door: door::Door,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// In the order in which `lifeboat --help` lists them.
#[derive(Subcommand)]
enum Command {
    Status(status::Status),
    Check(check::Check),
    Inventory(group::Inventory),
    Group(group::Group),
    Apply(apply::Apply),
    Points(points::Points),
    Failover(failover::Failover),
    Undo(undo::Undo),
    Drill(drill::Drill),
    Drills(drill::Drills),
    Report(report::Report),
    Reprotect(reprotect::Reprotect),
    Failback(failback::Failback),
    Prune(points::Prune),
    Replicas(replicas::Replicas),
    Release(release::Release),
    Seed(seed::Seed),
    Claim(handover::ClaimIt),
    Accept(handover::Accept),
    Verify(verify::Verify),
    Token(token::Token),
    Audit(audit::Audit),
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
    let site = Site { client: arguments.door.client()?, json: arguments.json };
    match arguments.command {
        Command::Status(status) => status.run(&site).await,
        Command::Check(check) => check.run(&site).await,
        Command::Inventory(inventory) => inventory.run(&site).await,
        Command::Group(group) => group.run(&site).await,
        Command::Apply(apply) => apply.run(&site).await,
        Command::Points(points) => points.run(&site).await,
        Command::Failover(failover) => failover.run(&site).await,
        Command::Undo(undo) => undo.run(&site).await,
        Command::Drill(drill) => drill.run(&site).await,
        Command::Drills(drills) => drills.run(&site).await,
        Command::Report(report) => report.run(&site).await,
        Command::Reprotect(reprotect) => reprotect.run(&site).await,
        Command::Failback(failback) => failback.run(&site).await,
        Command::Prune(prune) => prune.run(&site).await,
        Command::Replicas(replicas) => replicas.run(&site).await,
        Command::Release(release) => release.run(&site).await,
        Command::Seed(seed) => seed.run(&site).await,
        Command::Claim(claim) => claim.run(&site).await,
        Command::Accept(accept) => accept.run(&site).await,
        Command::Verify(verify) => verify.run(&site).await,
        Command::Token(token) => token.run(&site).await,
        Command::Audit(audit) => audit.run(&site).await,
    }
}
