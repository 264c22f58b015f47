//! `lifeboat failback`: what was failed over to this site, and is protected back, goes home by a planned failover. The command
//! leads; it looks how far things are at both sites before it does anything, so that the same command goes on wherever it,
//! or a controller, died.

use crate::{
    ask::{Ended, Site, confirm, path_segment},
    failover::follow,
    peer::{Meant, Other},
    reprotect,
};
use anyhow::{Context, bail, ensure};
use clap::Args;
use lifeboat::{
    local_api::{Client, ClientError},
    units::Span,
};
use lifeboat_site_controller::{
    api::types::{GroupFailoverPreview, GroupFailoverRequest, GroupRow, GroupState, VmRow},
    console::{groups, watch::Display},
    failover::{journal::Phase, progress::Progress, report::GroupReport, runbook::LATEST},
};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Bring a group, or a VM, back to the site that it came from: a planned failover there, which loses nothing.
///
/// It must be protected back to there (`lifeboat reprotect`). Waits until the other site is up to date; then the VMs stand,
/// their last points travel, they start there, and are shut off here. Whatever goes wrong before that lets them go on here.
/// Run it again if it was interrupted.
#[derive(Args)]
pub struct Failback {
    /// A group's name, or a VM's name or UUID.
    name: String,
    #[command(flatten)]
    other: Other,
    /// How long to wait until the other site is up to date.
    #[arg(long, value_name = "SPAN", default_value = "1h")]
    wait_at_most: Span,
    /// Only show what it would do.
    #[arg(long)]
    dry_run: bool,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

/// How far it is.
enum Stands {
    /// They run here and are protected to there; with what is waited for, if anything is.
    Here { waits_for: Option<String> },
    /// The failover home is begun.
    Begun,
    /// They run there.
    Home,
}

#[derive(Serialize)]
struct Plan {
    name: String,
    failover: GroupFailoverPreview,
    /// Why it would wait now.
    waits_for: Option<String>,
}

#[derive(Serialize)]
struct Report {
    name: String,
    /// Nothing was done now.
    already_home: bool,
    failover: Option<GroupReport>,
}

struct Journey<'a> {
    site: &'a Site,
    other: Client,
    meant: Meant,
    request: GroupFailoverRequest,
}

impl Failback {
    pub async fn run(self, site: &Site) -> Ended {
        let meant = Meant::find(site, &self.name, "failback").await?;
        let name = match (&meant.group, meant.members.first()) {
            (None, Some(only)) => only.vm.to_string(),
            _ => meant.name.clone(),
        };
        let request =
            GroupFailoverRequest { name, planned: true, point: LATEST.into(), skip_fence_command: false };
        let journey = Journey { site, other: self.other.client()?, meant, request };
        let until = Instant::now() + self.wait_at_most.0;
        let name = journey.meant.name.clone();
        match journey.stands().await? {
            Stands::Home => return journey.print(None),
            Stands::Begun => eprintln!("going on with a failover home that was begun"),
            Stands::Here { waits_for } => {
                let failover: GroupFailoverPreview =
                    journey.other.post("/v1/group-failovers/preview", &journey.request).await?;
                let plan = Plan { name, failover, waits_for };
                if self.dry_run {
                    return site.print(&plan, planned);
                }
                if !self.yes {
                    confirm(&planned(&plan), "its name", &plan.name)?;
                }
                journey.wait(until).await?;
            }
        }
        ensure!(
            !self.dry_run,
            "a failover home is begun; the same command without --dry-run goes on with it"
        );
        let report = journey.go(until).await?;
        journey.print(report)
    }
}

impl Journey<'_> {
    async fn stands(&self) -> anyhow::Result<Stands> {
        let (ours, theirs) = (self.meant.rows(&self.site.client).await?, self.meant.rows(&self.other).await?);
        let mut phases = Vec::new();
        for member in &self.meant.members {
            let here = ours.get(&member.vm).map(|row| row.generation);
            let there = theirs.get(&member.vm).and_then(|row| row.failover.as_ref());
            phases.push(there.filter(|record| Some(record.generation) > here).map(|record| record.phase));
        }
        if phases.iter().all(|phase| *phase == Some(Phase::Running)) {
            return Ok(Stands::Home);
        }
        if phases.iter().any(Option::is_some) {
            return Ok(Stands::Begun);
        }
        for claim in reprotect::claims(self.site, &self.meant).await? {
            let there = theirs.get(&claim.vm).map(|row| row.generation);
            ensure!(
                there.is_some_and(|there| there > claim.generation),
                "{} is not protected back to the other site; `lifeboat reprotect {}` does that",
                claim.name,
                self.meant.name
            );
        }
        let mut waits_for = None;
        for row in theirs.values() {
            waits_for = waits_for.or_else(|| is_behind(row));
        }
        if self.meant.group.is_some() {
            waits_for = waits_for.or(self.group_is_behind().await?);
        }
        Ok(Stands::Here { waits_for })
    }

    async fn group_is_behind(&self) -> anyhow::Result<Option<String>> {
        let path = format!("/v1/groups/{}", path_segment(&self.meant.name));
        let row: GroupRow = self.other.get(&path).await.with_context(|| {
            format!("asking for the group; `lifeboat reprotect {}` makes it there", self.meant.name)
        })?;
        let same = row.group.members.len() == self.meant.members.len()
            && self.meant.members.iter().all(|member| row.group.has(member.vm));
        ensure!(
            same,
            "the group has other members there; `lifeboat reprotect {}` makes it the same",
            self.meant.name
        );
        Ok(match row.state {
            GroupState::Protected => None,
            GroupState::Seeding => Some(row.reason.unwrap_or_else(|| "no point of all members yet".into())),
            GroupState::Late => Some(row.reason.unwrap_or_else(|| "its newest point is too old".into())),
            GroupState::Paused => {
                bail!("the group is paused there; `lifeboat group resume` at the other site")
            }
        })
    }

    /// Until what would have to travel while the VMs stand is little.
    async fn wait(&self, until: Instant) -> anyhow::Result<()> {
        let (mut display, mut told) = (Display::new(self.site.json), String::new());
        loop {
            let why = match self.stands().await? {
                Stands::Here { waits_for: Some(why) } => why,
                _ => break,
            };
            ensure!(Instant::now() < until, "the other site is not up to date: {why}");
            if why != told {
                display.step(&format!("waiting: {why}"));
                told = why;
            }
            tokio::time::sleep(LOOK).await;
        }
        display.finish();
        Ok(())
    }

    /// The failover; `None` if it was finished without us.
    async fn go(&self, until: Instant) -> anyhow::Result<Option<GroupReport>> {
        loop {
            match follow(&self.other, "/v1/group-failovers", &self.request, self.site.json).await {
                Ok(Progress::GroupDone { report }) => return Ok(Some(*report)),
                Ok(other) => bail!("the other site's controller answered {other:?}"),
                // Its controller was restarted, and has done it by itself, or is at it.
                Err(_) if matches!(self.stands().await, Ok(Stands::Home)) => return Ok(None),
                Err(error) if is_busy(&error) && Instant::now() < until => {
                    tokio::time::sleep(LOOK).await;
                    self.wait(until).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn print(&self, failover: Option<GroupReport>) -> Ended {
        let report = Report { name: self.meant.name.clone(), already_home: failover.is_none(), failover };
        self.site.print(&report, done)
    }
}

/// What the site still lacks of a VM.
fn is_behind(row: &VmRow) -> Option<String> {
    if !row.agent.as_ref().is_some_and(|agent| agent.connected) {
        return Some(format!("the agent of {} is not connected to it", row.name));
    }
    let current = row.latest.as_ref().filter(|point| !point.seed && point.generation == row.generation);
    if current.is_none() {
        return Some(format!("the first point of {} is on its way", row.name));
    }
    let interval =
        row.agent.as_ref().and_then(|seen| seen.report.as_ref()).map_or(0, |said| said.interval_ms);
    let age = row.rpo_ms.unwrap_or(u64::MAX);
    (age > OLD_MS.max(interval.saturating_mul(3)))
        .then(|| format!("the newest point of {} is {} s old", row.name, age / 1000))
}

fn is_busy(error: &anyhow::Error) -> bool {
    let Some(ClientError::Api { error, .. }) = error.downcast_ref() else { return false };
    // One that was interrupted is called off first, and may then be begun again.
    let interrupted = |words: &str| words.contains("it was interrupted");
    let said = interrupted(&error.what) || error.why.as_deref().is_some_and(interrupted);
    error.code == "busy" || (error.code == "called-off" && said)
}

fn planned(plan: &Plan) -> String {
    let mut out = format!("{} goes home.\n{}", plan.name, groups::failover_preview(&plan.failover));
    if let Some(why) = &plan.waits_for {
        out.push_str(&format!("It waits first: {why}.\n"));
    }
    out.replace("they start here", "they start there")
}

fn done(report: &Report) -> String {
    let name = &report.name;
    let mut out = match &report.failover {
        Some(failover) => groups::failover(failover),
        None => format!("{name} runs at the other site already.\n"),
    };
    out.push_str(&format!(
        "It is not protected now: `lifeboat reprotect {name}` at the other site protects it to this one.\n"
    ));
    out
}

const LOOK: Duration = Duration::from_secs(1);
/// A point that is younger leaves little to travel while the VMs stand.
const OLD_MS: u64 = 60_000;
