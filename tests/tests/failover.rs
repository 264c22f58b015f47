//! The main job, end to end: a running VM is protected, its site is lost, and it goes on at the other site.

use anyhow::Result;
use rig::{
    DiskFormat, GuestSpec, Rig,
    product::{Agent, Controller, replica_unharmed},
};
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// Goal: the VM goes on where it stood. Method: protect a working guest with a raw and a qcow2 disk, power-cut its site,
/// fail over to the newest point; the guest itself says whether memory and disks are of one instant.
#[test]
fn a_lost_site_s_vm_goes_on_at_the_other_site() -> Result<()> {
    let rig = Rig::new("failover")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = GuestSpec::new("web").disk(DiskFormat::Raw, 64).disk(DiskFormat::Qcow2, 64);
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "1s")?;
    controller.wait_points("web", 4, SOON)?;
    let before = guest.last().expect("it ticks");
    a.power_cut();
    let report = controller.failover("web", "latest")?;
    assert_eq!(report["resumed"], true, "{report}");
    let replica = b.guest("web")?;
    let after = replica_unharmed(&replica, &before.boot, 0, SOON)?;
    assert!(after.writes > 0);
    Ok(())
}
