//! Guests of much memory, and of huge pages: what takes them, and that what can't be taken is said.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig, eventually,
    product::{Agent, Controller, replica_unharmed, small},
};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(300);
const NR: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Huge pages of 2 MiB of this machine, besides those that it had; given back in the end.
struct HugePages {
    before: u64,
    more: u64,
}

impl HugePages {
    fn reserve(more: u64) -> Result<Self> {
        let before = read(NR)?;
        let pages = Self { before, more };
        pages.set(more)?;
        Ok(pages)
    }

    fn set(&self, more: u64) -> Result<()> {
        fs::write(NR, (self.before + more).to_string()).context("asking for huge pages")?;
        let got = read(NR)?;
        ensure!(got == self.before + more, "this machine has {got} huge pages, {more} more were asked for");
        Ok(())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR, self.before.to_string());
    }
}

fn read(path: &str) -> Result<u64> {
    Ok(fs::read_to_string(path).with_context(|| path.to_owned())?.trim().parse()?)
}

/// Goal: a guest of huge pages goes on where it stood; and a site that lacks them says so before it takes the guest from
/// its source. Method: protect one, lose it, fail over with too few pages, then with enough.
#[test]
fn a_guest_of_huge_pages_goes_on_where_it_stood_and_a_site_without_them_says_so() -> Result<()> {
    let pages = HugePages::reserve(96)?;
    let rig = Rig::new("huge")?;
    let (a, b, _link) = rig.pair()?;
    for site in [&a, &b] {
        site.offer_huge_pages()?;
    }
    let controller = Controller::running(&b)?;
    let unused = read(FREE)?;
    let huge = "<memoryBacking><hugepages/></memoryBacking>";
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32).more(huge))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    ensure!(read(FREE)? + 68 == unused, "68 pages are the guest's");
    let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let points = controller.wait_points("web", 4, SOON)?;
    ensure!(points.iter().all(|point| point["has_memory"] == true), "{points:?}");
    let row = agent.wait_state("web", "protected", SOON)?;
    assert_eq!(row["memory_engine"]["engine"], "stop-and-read", "{row}");
    ensure!(read(FREE)? + 68 == unused, "reading takes no pages");
    let tick = guest.last().context("it ticked")?.tick;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();

    pages.set(8)?;
    let generation = controller.vm("web")?["generation"].clone();
    let refused = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(
        !refused.status.success()
            && refused.stderr.contains("huge pages of 2048 KiB")
            && refused.stderr.contains("vm.nr_hugepages"),
        "{refused:?}"
    );
    assert_eq!(controller.vm("web")?["generation"], generation, "nothing was changed");
    pages.set(pages.more)?;
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, tick, SOON)?;
    ensure!(read(FREE)? + 68 == unused, "the replica is made of huge pages too");
    drop((agent, rig));
    Ok(())
}

/// Memory that a real host would have.
fn goes_on_unharmed(gib: u64) -> Result<()> {
    let rig = Rig::new(&format!("large-{gib}"))?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").memory_mib(gib << 10).disk(DiskFormat::Qcow2, 32).as_root();
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let web = "[[vm]]\nname = \"web\"\ninterval = \"2s\"\nmax_pause = \"60s\"";
    let mut agent = Agent::install(&a, &controller, web)?;
    agent.start()?;
    let points = controller.wait_points("web", 3, SOON)?;
    ensure!(points.iter().all(|point| point["has_memory"] == true), "{points:?}");
    let row = agent.wait_state("web", "protected", SOON)?;
    let pauses: Vec<_> = points.iter().map(|point| point["pause_us"].to_string()).collect();
    eprintln!("{gib} GiB: {}; pauses of {pauses:?} us", row["memory"]);
    ensure!(row["memory_engine"]["engine"].is_string(), "{row}");
    let tick = guest.last().context("it ticked")?.tick;
    controller.wait_more_points("web", 2, SOON)?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, tick, SOON)?;
    drop((agent, rig));
    Ok(())
}

#[test]
fn a_guest_of_four_gib_goes_on_where_it_stood() -> Result<()> {
    goes_on_unharmed(4)
}

/// Takes a machine of its own: `make soak`.
#[test]
#[ignore = "takes more than 16 GiB of memory and minutes"]
fn a_guest_of_sixteen_gib_goes_on_where_it_stood() -> Result<()> {
    goes_on_unharmed(16)
}

/// Goal: a guest whose memory can't be read within `max_pause` keeps running, has its disks protected, and its label says
/// why memory is missing. Method: 4 GiB, less time than reading it takes, and no other engine.
#[test]
fn memory_that_does_not_fit_into_max_pause_is_left_out_and_said_so() -> Result<()> {
    let rig = Rig::new("too-large")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").memory_mib(4 << 10).disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let web = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmax_pause = \"300ms\"\n\
               memory_engine = \"stop-and-read\"";
    let mut agent = Agent::install(&a, &controller, web)?;
    agent.start()?;
    let label = eventually(SOON, "the label to say so", || {
        let Ok(row) = agent.vm("web") else { return Ok(None) };
        let told = format!("{} {}", row["memory"], row["reason"]);
        Ok((told.contains("disks only") && told.contains("max_pause")).then_some(told))
    })
    .with_context(|| format!("{:?}", agent.vm("web")))?;
    eprintln!("{label}");
    eventually(SOON, "its disks to be protected", || {
        let points = controller.points("web").unwrap_or_default();
        ensure!(points.iter().all(|point| point["has_memory"] == false), "{points:?}");
        Ok((points.len() >= 2).then_some(()))
    })?;
    let then = guest.last().context("it ticked")?.tick;
    let report = guest.wait_for_tick(then + 5, SOON)?;
    ensure!(report.unharmed() && report.boot == boot, "{report:?}");
    Ok(())
}
