//! The second act: a group of two is drilled, and goes to the other site as planned. Each time the guests themselves say
//! whether they were harmed. Called by `play`.

use crate::story::Act;
use anyhow::{Context, Result};
use rig::{
    Console, DiskFormat, Rig, Site,
    product::{Agent, Controller, small},
};
use serde_json::Value;
use std::{path::Path, sync::Arc, time::Duration};

/// Plays it; `say` is told what happens.
pub fn play(rig: &Arc<Rig>, say: &mut dyn FnMut(String)) -> Result<Vec<Act>> {
    let mut life = Life::begin(rig)?;
    say(format!("a group of two, `{GROUP}`, is at work at C and protected to D"));
    let acts = [Life::drill, Life::planned];
    let mut story = Vec::new();
    for act in acts {
        let done = act(&mut life)?;
        say(told(&done));
        story.push(done);
    }
    Ok(story)
}

/// The site that it is protected to, and who must live so long.
struct Life {
    site: Site,
    controller: Controller,
    _agent: Agent,
    boots: Vec<String>,
}

impl Life {
    fn begin(rig: &Arc<Rig>) -> Result<Self> {
        let (c, d) = (rig.site("C")?, rig.site("D")?);
        rig.link(&c, &d, rig::Shape::default())?;
        let controller = Controller::running(&d)?;
        let mut agent = Agent::install(&c, &controller, "[defaults]\nmax_pause = \"5s\"")?;
        agent.start()?;
        let mut boots = Vec::new();
        for name in MEMBERS {
            let guest = c.define_and_start(&small(name).disk(DiskFormat::Qcow2, 32))?;
            boots.push(guest.wait_for_tick(3, PATIENCE)?.boot);
        }
        rig::eventually(PATIENCE, "the group to be made", || {
            let command = ["group", "create", GROUP, "--vm", MEMBERS[0], "--vm", MEMBERS[1], "--rpo", "2s"];
            Ok(controller.cli(&command)?.status.success().then_some(()))
        })?;
        controller.wait_more_group_points(GROUP, 3, PATIENCE)?;
        Ok(Self { site: d, controller, _agent: agent, boots })
    }

    /// Beside the sources, which go on.
    fn drill(&mut self) -> Result<Act> {
        let drill = self.controller.json(&["drill", GROUP, "--keep"])?;
        let dir = Path::new(drill["dir"].as_str().context("the drill's folder")?);
        let of = |name: &&str| {
            let members = drill["members"].as_array().into_iter().flatten();
            let vm = members.clone().find(|member| member["name"] == **name)?["vm"].as_str()?;
            Some(Console::at(dir.join(vm).join("console.log")))
        };
        let consoles: Vec<Console> = MEMBERS.iter().filter_map(of).collect();
        let act = self.act("drill", &drill, &consoles)?;
        self.controller.json(&["drill", GROUP, "--end"])?;
        Ok(act)
    }

    fn planned(&mut self) -> Result<Act> {
        let report = self.controller.json(&["failover", GROUP, "--planned", "--yes"])?;
        self.act("planned", &report, &self.consoles()?)
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

    fn consoles(&self) -> Result<Vec<Console>> {
        MEMBERS.iter().map(|name| Ok(Console::at(self.site.guest(name)?.console().path()))).collect()
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
