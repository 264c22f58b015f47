//! The second act: a group of two is drilled, goes to the other site as planned, comes home, and is saved when its site is
//! lost. Each time the guests themselves say whether they were harmed. Called by `play`.

use crate::story::Act;
use anyhow::{Context, Result};
use rig::{
    Console, DiskFormat, GuestSpec, Rig, Site,
    product::{Agent, Controller, small},
};
use serde_json::Value;
use std::{fs, path::Path, sync::Arc, time::Duration};

/// Plays it; `say` is told what happens.
pub fn play(rig: &Arc<Rig>, say: &mut dyn FnMut(String)) -> Result<Vec<Act>> {
    let mut life = Life::begin(rig)?;
    say(format!("a group of two, `{GROUP}`, is at work at C and protected to D"));
    let acts = [Life::drill, Life::planned, Life::failback, Life::emergency];
    let mut story = Vec::new();
    for act in acts {
        let done = act(&mut life)?;
        say(told(&done));
        story.push(done);
    }
    Ok(story)
}

/// A site with its controller, and its host's agent, which protects to the other end.
struct End {
    site: Site,
    controller: Controller,
    _agent: Agent,
    /// How a command names the other end.
    other: Vec<String>,
}

struct Life {
    c: End,
    d: End,
    boots: Vec<String>,
}

impl Life {
    fn begin(rig: &Arc<Rig>) -> Result<Self> {
        let (c, d) = (rig.site("C")?, rig.site("D")?);
        rig.link(&c, &d, rig::Shape::default())?;
        let (at_c, at_d) = (Controller::listening(&c)?, Controller::listening(&d)?);
        let agent = |site: &Site, to: &Controller| -> Result<Agent> {
            let mut agent = Agent::install(site, to, "[defaults]\nmax_pause = \"5s\"")?;
            agent.install_hook()?;
            agent.start()?;
            Ok(agent)
        };
        let (of_c, of_d) = (agent(&c, &at_d)?, agent(&d, &at_c)?);
        let mut boots = Vec::new();
        for name in MEMBERS {
            let guest = c.define_and_start(&small(name).disk(DiskFormat::Qcow2, 32))?;
            boots.push(guest.wait_for_tick(3, PATIENCE)?.boot);
        }
        rig::eventually(PATIENCE, "the group to be made", || {
            let command = ["group", "create", GROUP, "--vm", MEMBERS[0], "--vm", MEMBERS[1], "--rpo", "2s"];
            Ok(at_d.cli(&command)?.status.success().then_some(()))
        })?;
        at_d.wait_more_group_points(GROUP, 3, PATIENCE)?;
        let (to_d, to_c) = (at_c.peer(&at_d)?, at_d.peer(&at_c)?);
        let c = End { site: c, controller: at_c, _agent: of_c, other: to_d };
        let d = End { site: d, controller: at_d, _agent: of_d, other: to_c };
        Ok(Self { c, d, boots })
    }

    /// Beside the sources, which go on.
    fn drill(&mut self) -> Result<Act> {
        let drill = self.d.controller.json(&["drill", GROUP, "--keep"])?;
        let dir = Path::new(drill["dir"].as_str().context("the drill's folder")?);
        let of = |name: &&str| {
            let members = drill["members"].as_array().into_iter().flatten();
            let vm = members.clone().find(|member| member["name"] == **name)?["vm"].as_str()?;
            Some(Console::at(dir.join(vm).join("console.log")))
        };
        let consoles: Vec<Console> = MEMBERS.iter().filter_map(of).collect();
        let act = self.act("drill", &drill, &consoles)?;
        self.d.controller.json(&["drill", GROUP, "--end"])?;
        Ok(act)
    }

    fn planned(&mut self) -> Result<Act> {
        let report = self.d.controller.json(&["failover", GROUP, "--planned", "--yes"])?;
        self.act("planned", &report, &self.d.consoles()?)
    }

    /// Only what changed since travels.
    fn failback(&mut self) -> Result<Act> {
        self.d.leads("reprotect")?;
        self.c.controller.wait_more_group_points(GROUP, 1, PATIENCE)?;
        self.c.forget_consoles()?;
        let report = self.d.leads("failback")?;
        self.act("failback", &report["failover"], &self.c.consoles()?)
    }

    fn emergency(&mut self) -> Result<Act> {
        self.c.leads("reprotect")?;
        self.d.controller.wait_more_group_points(GROUP, 1, PATIENCE)?;
        self.d.forget_consoles()?;
        self.c.site.power_cut();
        let report = self.d.controller.json(&["failover", GROUP, "--emergency", "--yes"])?;
        self.act("emergency", &report, &self.d.consoles()?)
    }

    /// What the guests say after it, once each has checked all its memory and disks.
    fn act(&self, kind: &'static str, report: &Value, consoles: &[Console]) -> Result<Act> {
        let seconds = |key: &str| report[key].as_u64().map(|ms| ms as f64 / 1e3);
        let mut act = Act {
            kind,
            rto_s: seconds("rto_ms").with_context(|| format!("{kind}: no RTO in {report}"))?,
            rpo_s: seconds("rpo_ms").with_context(|| format!("{kind}: no RPO in {report}"))?,
            same_boot_id: consoles.len() == self.boots.len(),
            memory_errors: 0,
            disk_errors: 0,
        };
        for (console, boot) in consoles.iter().zip(&self.boots) {
            let first = console.wait(PATIENCE, "a guest's first word", |_| true)?;
            let whole = console.wait(PATIENCE, "a guest to have checked everything", |seen| {
                seen.mem_sweeps > first.mem_sweeps + 1 && seen.disk_sweeps > first.disk_sweeps + 1
            })?;
            act.same_boot_id &= whole.boot == *boot;
            act.memory_errors += whole.mem_errors;
            act.disk_errors += whole.disk_errors;
        }
        Ok(act)
    }
}

impl End {
    /// A command about the group, which runs here, and the other end.
    fn leads(&self, what: &str) -> Result<Value> {
        let other: Vec<&str> = self.other.iter().map(String::as_str).collect();
        self.controller.json(&[&[what, GROUP], other.as_slice(), &["--yes"]].concat())
    }

    fn consoles(&self) -> Result<Vec<Console>> {
        MEMBERS.iter().map(|name| Ok(Console::at(self.site.guest(name)?.console().path()))).collect()
    }

    /// What the guests said here when they last ran here.
    fn forget_consoles(&self) -> Result<()> {
        for name in MEMBERS {
            fs::remove_file(self.site.host_path(GuestSpec::console_path(name))?)?;
        }
        Ok(())
    }
}

fn told(act: &Act) -> String {
    let Act { kind, rto_s, rpo_s, memory_errors, disk_errors, .. } = act;
    let boot = if act.same_boot_id { "same boot" } else { "NOT THE SAME BOOT" };
    let errors = memory_errors + disk_errors;
    format!("{kind}: RTO {rto_s:.1} s, RPO {rpo_s:.1} s, both guests: {boot}, {errors} errors")
}

const GROUP: &str = "shop";
const MEMBERS: [&str; 2] = ["front", "back"];
const PATIENCE: Duration = Duration::from_secs(180);
