//! How a guest's memory is captured is chosen by itself, said with its reason, and never silently left out.

use anyhow::Result;
use rig::{
    DiskFormat, Rig, eventually,
    product::{Agent, Controller, small},
};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: a guest whose memory can't be captured has its disks protected, and says why; its operator may have it refused
/// instead. Method: memory that is shared with other processes.
#[test]
fn a_guest_whose_memory_can_not_be_captured_is_protected_without_it_or_refused_as_told() -> Result<()> {
    let rig = Rig::new("no-memory")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";
    let spec = small("web").disk(DiskFormat::Raw, 16);
    let guest = a.define_and_start(&spec.clone().more(shared))?;
    guest.wait_for_tick(2, BOOT)?;
    let mut agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let points = controller.wait_points("web", 2, SOON)?;
    assert!(points.iter().all(|point| point["has_memory"] == false), "{points:?}");
    let row = agent.wait_state("web", "protected", SOON)?;
    let told = row["memory"].as_str().unwrap_or_default();
    assert!(told.starts_with("disks only: ") && told.contains("shared with other processes"), "{row}");
    assert!(row["memory_engine"]["engine"].is_null(), "{row}");
    assert_eq!(controller.vm("web")?["agent"]["report"]["memory"], row["memory"]);

    agent.stop()?;
    agent
        .configure(&controller.address(), "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmemory = \"on\"")?;
    agent.start()?;
    let row = agent.wait_state("web", "refused", SOON)?;
    let reason = row["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("shared with other processes") && reason.contains("memory = \"auto\""), "{row}");

    // The guest is changed as told: with its next start it has memory again, whatever the mode.
    guest.destroy()?;
    a.define(&spec)?;
    guest.start()?;
    eventually(SOON, "points with memory", || {
        let points = controller.points("web")?;
        Ok(points.iter().any(|point| point["has_memory"] == true).then_some(()))
    })?;
    let row = agent.wait_state("web", "protected", SOON)?;
    assert!(row["memory_engine"]["engine"].is_string(), "{row}");
    Ok(())
}
