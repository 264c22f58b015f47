//! The rig keeps its own promises; the witness above all must not be one that always says yes.

use std::time::Duration;

use anyhow::{Context, Result};
use rig::{Accel, DiskFormat, GuestSpec, Rig, Shape, eventually};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(60);

/// Goal: a site is a machine: a guest boots in it and works, and a power cut leaves nothing alive.
#[test]
fn a_power_cut_kills_everything_in_the_site_at_once() -> Result<()> {
    let rig = Rig::new("power-cut")?;
    println!("guests run under {}", rig.accel());
    let site = rig.site("A")?;
    let guest = site.define_and_start(&GuestSpec::new("vm1").disk(DiskFormat::Raw, 32))?;
    let report = guest.wait_for_tick(5, BOOT)?;
    assert!(report.unharmed(), "{report:?}");
    let mut sleeper = site.spawn(["sleep", "1000"])?;
    let qemu = guest.qemu_pid()?;
    site.power_cut();
    assert!(
        !std::path::Path::new(&format!("/proc/{qemu}")).exists(),
        "QEMU outlived the power cut"
    );
    sleeper.wait(SOON)?;
    assert!(
        site.run(["true"]).is_err(),
        "a site without power runs nothing"
    );
    Ok(())
}
