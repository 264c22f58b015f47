//! A host whose libvirt says that its QEMU is of an earlier release than it is: by what libvirt has written down of it, and
//! believes until the program changes. Calls nothing here; called by `site` and `second_host`.

use anyhow::{Context, Result, ensure};
use std::{fs, path::Path};

/// 6.2.0, as libvirt counts; every QEMU that the tests run on is later.
const EARLIER: &str = "6002000";
/// As people and [`Site::virsh`](crate::Site::virsh) say it.
pub const SAID: &str = "QEMU 6.2.0";

/// While libvirtd is stopped. `cache` is its /var/cache/libvirt.
pub fn pretend(cache: &Path) -> Result<()> {
    let folder = cache.join("qemu/capabilities");
    let mut changed = 0;
    for file in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = file?.path();
        let text = fs::read_to_string(&path)?;
        let Some((before, rest)) = text.split_once("<version>") else { continue };
        let (_, after) = rest.split_once('<').context("a version ends")?;
        fs::write(&path, format!("{before}<version>{EARLIER}<{after}"))?;
        changed += 1;
    }
    // Otherwise libvirt would look anew, and the test show nothing.
    ensure!(changed > 0, "libvirt has written nothing down in {}", folder.display());
    Ok(())
}

/// It looks anew when it starts.
pub fn no_longer(cache: &Path) -> Result<()> {
    fs::remove_dir_all(cache.join("qemu/capabilities")).context("removing what libvirt has written down")
}
