//! What an auditor asks of a site: which points there are, whether the RPO was kept, what drills and failovers showed,
//! and whether a failover would work now. [`gather`] asks the other rooms, [`age`], [`rpo`] and [`points`] make the
//! figures, [`history`] tells of failovers, [`html`] is the page. Points go; what they tell of the RPO is kept before:
//! [`recorder`] makes a [`slot`] of it every ten minutes, which [`log`] keeps.
//! Promises: no figure is guessed: what neither slots nor points tell is said to be unknown, and not counted. Changes
//! nothing but its log. Called by `api`, and by the daemon.

pub mod age;
pub mod gather;
pub mod history;
pub mod html;
pub mod log;
pub mod points;
pub mod recorder;
pub mod rpo;
pub mod slot;

use crate::{drill::DrillRecord, readiness::Readiness};
use history::Failover;
use lifeboat::units::UnixMs;
use points::Points;
use rpo::Attained;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `GET /v1/report`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    pub version: u32,
    pub site: String,
    /// Of Lifeboat.
    pub release: String,
    pub made_at: UnixMs,
    /// It is about the time from then until it was made.
    pub since: UnixMs,
    /// Groups first, then VMs.
    pub subjects: Vec<Subject>,
    /// What the figures do not say.
    pub limits: Vec<String>,
}

/// A group, or a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ReportSubject")]
pub struct Subject {
    pub name: String,
    pub is_group: bool,
    /// Of a VM: the group that it is in.
    pub group: Option<String>,
    /// Of a group: its VMs.
    pub members: Vec<String>,
    /// How old the newest durable point may be. `None`: nobody has said so.
    pub target_ms: Option<u64>,
    /// Of a group these are its group points.
    pub points: Points,
    pub rpo: Attained,
    /// How often a drill begins by itself.
    pub drill_every: Option<String>,
    /// Those that began in the time of the report, oldest first.
    pub drills: Vec<DrillRecord>,
    /// Failovers and undos that began in that time, oldest first.
    pub failovers: Vec<Failover>,
    /// Whether a failover would work now; of a VM in a group its group's says so.
    pub readiness: Option<Readiness>,
}

impl Report {
    pub const VERSION: u32 = 1;
}
