//! What must never be: source and replica of a VM running at once by a planned failover, whatever dies when; and VMs of
//! which neither runs in the end. In a world of two sites that is made of tables.

use super::*;
use crate::{
    failover::{
        group::world::{SourceError, ToPlace, WholePoint},
        journal::{Manner, Placed},
        report::FailoverReport,
    },
    group::{MemberVm, spec::WaitFor},
};
use async_trait::async_trait;
use lifeboat::units::Generation;
use lifeboat::{
    clock::ManualClock,
    id::{PointId, VmId},
    units::Seq,
};
use std::collections::BTreeMap;

mod newest;
mod off;
mod settle;
mod undo;
mod waits;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Runs,
    Stands,
    Off,
}

#[derive(Default)]
struct Tables {
    sources: BTreeMap<VmId, Source>,
    running: BTreeSet<VmId>,
    has_run: BTreeSet<VmId>,
    /// Members that were off, and of these the replicas that are there.
    off: BTreeSet<VmId>,
    defined: BTreeSet<VmId>,
    prepared: BTreeMap<VmId, PointId>,
    restored: BTreeSet<VmId>,
    generations: BTreeMap<VmId, Generation>,
    /// Under which generation a source last went on.
    resumed: BTreeMap<VmId, Generation>,
    starts: Vec<VmId>,
    calls: u32,
    /// The controller dies at this call: before it has an effect, or after.
    dies_at: Option<(u32, bool)>,
    /// How often each was.
    rewound: BTreeMap<VmId, u32>,
    start_fails: BTreeSet<VmId>,
    /// Those that were resumed first.
    booted: BTreeSet<VmId>,
    /// A start goes on once as many are under way.
    meet: Option<Arc<tokio::sync::Barrier>>,
    prepare_fails: BTreeSet<VmId>,
    /// Members whose point can't be read.
    is_damaged: BTreeSet<VmId>,
    /// Replicas that there is room for.
    room_for: Option<usize>,
    /// No host has room for all.
    no_host: bool,
    cut_fails: bool,
    unreached: bool,
    /// How often a source was to be told what became of it.
    told: u32,
}

#[derive(Clone, Default)]
struct World(Arc<Mutex<Tables>>);

impl World {
    /// One call: dies before or after its effect if that is this run's lot; nothing that may not be is true in between.
    fn call<T>(&self, effect: impl FnOnce(&mut Tables) -> T) -> T {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tables.calls += 1;
        let dies = tables.dies_at.filter(|(at, _)| *at == tables.calls).map(|(_, after)| after);
        if dies.is_some() {
            tables.dies_at = None;
        }
        assert_ne!(dies, Some(false), "died before a call");
        let out = effect(&mut tables);
        for (vm, source) in &tables.sources {
            assert!(!(*source == Source::Runs && tables.running.contains(vm)), "BOTH RUN: {vm}");
        }
        assert_ne!(dies, Some(true), "died after a call");
        out
    }
}

fn vm(no: u8) -> VmId {
    VmId::from_bytes([no; 16])
}

#[async_trait]
impl Replicas for World {
    async fn room_for(&self, points: &[(VmId, PointId)]) -> Result<(), FailoverError> {
        let full = self.call(|tables| points.len() > tables.room_for.unwrap_or(usize::MAX));
        if full { Err(FailoverError::Wait("no room for all of them".into())) } else { Ok(()) }
    }
    async fn place(&self, members: &[ToPlace], _: &Watcher) -> Result<Vec<Option<Placed>>, FailoverError> {
        let full = self.call(|tables| {
            // Nobody stands for a failover that has no hosts.
            assert!(!tables.no_host || tables.sources.values().all(|source| *source != Source::Stands));
            tables.no_host
        });
        if full {
            Err(FailoverError::NoHost { name: "web".into(), why: String::new() })
        } else {
            Ok(vec![None; members.len()])
        }
    }
    async fn prepare(
        &self,
        vm: VmId,
        point: PointId,
        _: Kind,
        _: Manner,
        _: Option<Placed>,
        _: &Watcher,
    ) -> Result<bool, FailoverError> {
        self.call(|tables| {
            if tables.prepare_fails.contains(&vm) {
                return Err(FailoverError::Wait("it can't work".into()));
            }
            Ok(tables.prepared.insert(vm, point).is_none())
        })
    }
    async fn make_ready(&self, vm: VmId, _: PointId, _: Duration, _: &Watcher) -> Result<(), FailoverError> {
        self.call(|tables| {
            let point = PointId::from_bytes([7; 16]);
            let damaged = FailoverError::PointDamaged { point, why: "a hole".into() };
            if tables.is_damaged.contains(&vm) { Err(damaged) } else { Ok(()) }
        })
    }
    async fn rewind(&self, vm: VmId, _: PointId, _: Duration, _: &Watcher) -> Result<(), FailoverError> {
        self.call(|tables| {
            if tables.running.remove(&vm) {
                tables.restored.remove(&vm);
                tables.has_run.remove(&vm);
                *tables.rewound.entry(vm).or_default() += 1;
            }
        });
        Ok(())
    }
    async fn restore(&self, vm: VmId, _: &Watcher) -> Result<(), FailoverError> {
        self.call(|tables| {
            assert!(tables.prepared.contains_key(&vm));
            tables.restored.insert(vm);
        });
        Ok(())
    }
    async fn fence(&self, vm: VmId, _: bool, _: &Watcher) -> Result<Generation, FailoverError> {
        Ok(self.call(|tables| {
            let generation = tables.generations.entry(vm).or_insert(Generation(1));
            *generation = Generation(2);
            *generation
        }))
    }
    async fn is_fenced(&self, vm: VmId) -> Result<bool, FailoverError> {
        Ok(self.call(|tables| tables.generations[&vm] > Generation(1)))
    }
    async fn start(&self, vm: VmId, _: &Watcher) -> Result<FailoverReport, FailoverError> {
        let meet = self.call(|tables| tables.meet.clone().filter(|_| !tables.has_run.contains(&vm)));
        if let Some(meet) = meet {
            meet.wait().await;
        }
        self.call(|tables| {
            assert!(tables.restored.contains(&vm));
            if tables.start_fails.contains(&vm) {
                return Err(FailoverError::DidNotRun { state: "gone".into() });
            }
            let (left_off, booted) = (tables.off.contains(&vm), tables.booted.contains(&vm));
            if left_off {
                tables.defined.insert(vm);
            } else {
                tables.running.insert(vm);
            }
            if !left_off && tables.has_run.insert(vm) {
                tables.starts.push(vm);
            }
            Ok(report(vm, !left_off && !booted, left_off))
        })
    }
    async fn boot_instead(&self, vm: VmId, _: &str, _: &Watcher) -> Result<FailoverReport, FailoverError> {
        self.call(|tables| {
            assert!(tables.running.contains(&vm) && tables.booted.insert(vm), "twice");
        });
        Ok(report(vm, false, false))
    }
    async fn is_active(&self, vm: VmId) -> Result<bool, FailoverError> {
        Ok(self.call(|tables| tables.running.contains(&vm)))
    }
    async fn has_run(&self, vm: VmId) -> Result<bool, FailoverError> {
        Ok(self.call(|tables| tables.has_run.contains(&vm)))
    }
    async fn is_done(&self, vm: VmId) -> Result<bool, FailoverError> {
        Ok(self.call(|tables| tables.has_run.contains(&vm) || tables.defined.contains(&vm)))
    }
    async fn withdraw(&self, vm: VmId) -> Result<(), FailoverError> {
        self.call(|tables| {
            assert!(!tables.running.contains(&vm));
            tables.defined.remove(&vm);
            tables.prepared.remove(&vm);
            tables.restored.remove(&vm);
        });
        Ok(())
    }
    async fn generation(&self, vm: VmId) -> Generation {
        self.call(|tables| tables.generations[&vm])
    }
    async fn raise(&self, vm: VmId, generation: Generation) -> Result<(), FailoverError> {
        self.call(|tables| {
            tables.generations.insert(vm, generation);
        });
        Ok(())
    }
    async fn is_up(&self, vm: VmId, _: Option<&Placed>, wait: &WaitFor) -> Result<bool, FailoverError> {
        let booted = || self.0.lock().unwrap().booted.contains(&vm);
        Ok(*wait == WaitFor::Agent || booted())
    }
}

#[async_trait]
impl Sources for World {
    async fn points(&self, _: GroupId) -> Result<Vec<WholePoint>, SourceError> {
        Ok(Vec::new())
    }
    async fn final_cut(&self, group: &Group, cut: CutId) -> Result<WholePoint, SourceError> {
        for (at, member) in group.members.iter().enumerate() {
            let fails = self.call(|tables| {
                tables.sources.insert(member.vm, Source::Stands);
                tables.cut_fails && at > 0
            });
            if fails {
                return Err(SourceError("one has no room".into()));
            }
        }
        Ok(point(group, cut))
    }
    async fn end_hold(&self, vm: VmId, _: CutId, order: CutOrder) -> Result<bool, SourceError> {
        Ok(self.call(|tables| {
            tables.told += 1;
            if tables.unreached {
                return false;
            }
            match order {
                CutOrder::Resume { generation } => {
                    tables.sources.insert(vm, Source::Runs);
                    tables.resumed.insert(vm, generation);
                }
                CutOrder::ShutOff { .. } => drop(tables.sources.insert(vm, Source::Off)),
                other => panic!("{other:?}"),
            }
            true
        }))
    }
}

fn report(vm: VmId, resumed: bool, left_off: bool) -> FailoverReport {
    let zero = UnixMs::default();
    FailoverReport {
        vm,
        name: String::new(),
        kind: String::new(),
        point: PointId::from_bytes([1; 16]),
        seq: Seq(1),
        cut_at: zero,
        generation: 2,
        started_at: zero,
        running_at: zero,
        rto_ms: 0,
        rpo_ms: 0,
        resumed,
        left_off,
        already_done: false,
        host: None,
        cold_boot: None,
        refused: Vec::new(),
        after_resume: Vec::new(),
        addresses: Vec::new(),
    }
}

fn point(group: &Group, cut: CutId) -> WholePoint {
    let members = group.members.iter().map(|member| (member.vm, PointId::from_bytes([7; 16])));
    WholePoint { cut, cut_at: UnixMs(5), members: members.collect() }
}

fn named(point: &WholePoint) -> Chosen<'_> {
    Chosen { point, newest: false }
}

fn shop() -> Group {
    let mut group = Group::alone(vm(9), "shop", UnixMs(1));
    group.spec = crate::group::GroupSpec::new("shop", &["web", "db", "cache"]);
    group.members = ["web", "db", "cache"]
        .iter()
        .zip(1..)
        .map(|(name, no)| MemberVm { vm: vm(no), name: (*name).into() })
        .collect();
    let after = |names: &[&str]| crate::group::spec::VmSteps {
        after: names.iter().map(|name| (*name).into()).collect(),
        ..Default::default()
    };
    group.spec.runbook.vm =
        BTreeMap::from([("web".into(), after(&["db"])), ("db".into(), after(&["cache"]))]);
    group
}

fn world() -> World {
    let world = World::default();
    {
        let mut tables = world.0.lock().unwrap();
        for no in 1..=3 {
            tables.sources.insert(vm(no), Source::Runs);
            tables.generations.insert(vm(no), Generation(1));
        }
    }
    world
}

fn controller(world: &World, dir: &std::path::Path) -> Arc<Groups> {
    let (replicas, sources) = (Arc::new(world.clone()), Arc::new(world.clone()));
    let journal = Journal::open(dir.to_path_buf()).unwrap();
    Arc::new(Groups::new(replicas, sources, journal, Arc::new(ManualClock::at(UnixMs(10)))))
}

const CUT: CutId = CutId::from_bytes([3; 16]);

/// Runs a planned failover whose controller dies where the world says, then restarts controllers until it is over.
async fn run(world: &World) -> (Result<GroupReport, GroupError>, u32) {
    let dir = tempfile::tempdir().unwrap();
    let groups = controller(world, dir.path());
    let task = tokio::spawn({
        let groups = groups.clone();
        async move { groups.planned(shop(), CUT, &Watcher::nobody()).await }
    });
    let first = task.await;
    let calls = world.0.lock().unwrap_or_else(PoisonError::into_inner).calls;
    let Ok(ended) = first else {
        for _ in 0..3 {
            let groups = controller(world, dir.path());
            let _ = groups.take_up(shop().id, &Watcher::nobody()).await;
        }
        let record = Journal::open(dir.path().into()).unwrap().load_group(shop().id).unwrap();
        assert!(record.is_none_or(|record| record.is_over()));
        return (Err(GroupError::Busy), calls);
    };
    (ended, calls)
}

/// In the end each VM runs at one site, all of them at the same.
fn one_site(world: &World) -> bool {
    let tables = world.0.lock().unwrap_or_else(PoisonError::into_inner);
    let here = tables.running.len();
    let there = tables.sources.values().filter(|source| **source == Source::Runs).count();
    assert!((here, there) == (3, 0) || (here, there) == (0, 3), "{here} here, {there} there");
    assert!(tables.sources.values().all(|source| *source != Source::Stands), "a source was left standing");
    here == 3
}

#[tokio::test]
async fn a_planned_failover_starts_in_order_loses_nothing_and_leaves_the_sources_off() {
    let world = world();
    let report = run(&world).await.0.unwrap();
    assert_eq!((report.rpo_ms, report.sources_left.len()), (0, 0));
    assert!(one_site(&world));
    let tables = world.0.lock().unwrap();
    assert_eq!(tables.starts, [vm(3), vm(2), vm(1)]);
    assert!(tables.sources.values().all(|source| *source == Source::Off));
}

#[tokio::test]
async fn wherever_the_controller_dies_in_a_planned_failover_each_vm_runs_at_one_site_and_never_at_both() {
    let calls = run(&world()).await.1;
    let (mut here, mut there) = (0, 0);
    for at in 1..=calls {
        for after in [false, true] {
            let world = world();
            world.0.lock().unwrap().dies_at = Some((at, after));
            drop(run(&world).await);
            if one_site(&world) { here += 1 } else { there += 1 }
        }
    }
    assert!(calls > 15 && here > 10 && there > 10, "{calls} {here} {there}");
}

#[tokio::test]
async fn what_goes_wrong_before_a_replica_runs_gives_the_vms_back_also_if_the_controller_dies_meanwhile() {
    for cut_fails in [true, false] {
        let broken = || {
            let world = world();
            {
                let mut tables = world.0.lock().unwrap();
                tables.cut_fails = cut_fails;
                tables.start_fails = BTreeSet::from([vm(3)]);
            }
            world
        };
        let first = broken();
        let (ended, calls) = run(&first).await;
        assert!(matches!(ended, Err(GroupError::CalledOff { .. })), "{ended:?}");
        assert!(!one_site(&first));
        let back = if cut_fails { Generation(1) } else { Generation(3) };
        assert!(first.0.lock().unwrap().resumed.values().all(|generation| *generation == back));
        for at in 1..=calls {
            let world = broken();
            world.0.lock().unwrap().dies_at = Some((at, true));
            drop(run(&world).await);
            // A start that fails for ever after the commit is tried again until it is called off.
            assert!(!one_site(&world), "died after call {at}");
        }
    }
}

#[tokio::test]
async fn a_member_that_does_not_start_holds_back_those_after_it_and_nothing_is_given_back_once_one_has_run() {
    let world = world();
    world.0.lock().unwrap().start_fails = BTreeSet::from([vm(2)]);
    let ended = run(&world).await.0;
    let Err(GroupError::Incomplete { failed }) = ended else { panic!("{ended:?}") };
    assert_eq!(failed.len(), 2, "{failed:?}");
    let tables = world.0.lock().unwrap();
    assert_eq!(tables.running, BTreeSet::from([vm(3)]));
    assert!(
        tables.sources.values().all(|source| *source == Source::Stands),
        "they stand until it is finished"
    );
}

#[tokio::test]
async fn members_that_wait_for_nobody_start_side_by_side() {
    let (dir, world) = (tempfile::tempdir().unwrap(), world());
    let mut group = shop();
    group.spec.runbook.vm.clear();
    world.0.lock().unwrap().sources.values_mut().for_each(|source| *source = Source::Off);
    world.0.lock().unwrap().meet = Some(Arc::new(tokio::sync::Barrier::new(3)));
    let groups = controller(&world, dir.path());
    let whole = point(&group, CUT);
    let watcher = Watcher::nobody();
    let failover = groups.emergency(group, named(&whole), false, &watcher);
    let report = tokio::time::timeout(Duration::from_secs(10), failover).await;
    assert_eq!(report.expect("one waits for another").unwrap().members.len(), 3);
}

#[tokio::test]
async fn an_emergency_that_can_t_be_done_for_one_member_is_begun_for_none_and_stands_in_nobody_s_way() {
    let dir = tempfile::tempdir().unwrap();
    let world = world();
    let groups = controller(&world, dir.path());
    let refused =
        async || groups.emergency(shop(), named(&point(&shop(), CUT)), false, &Watcher::nobody()).await;
    world.0.lock().unwrap().prepare_fails = BTreeSet::from([vm(3)]);
    assert!(matches!(refused().await, Err(GroupError::Vm(_))));
    {
        let mut tables = world.0.lock().unwrap();
        assert!(tables.prepared.is_empty() && tables.generations.values().all(|of| *of == Generation(1)));
        tables.prepare_fails.clear();
        tables.room_for = Some(2);
    }
    assert!(refused().await.unwrap_err().to_string().contains("no room"), "each alone would have had room");
    assert_eq!(groups.journal.load_group(shop().id).unwrap(), None);
    world.0.lock().unwrap().room_for = None;
    groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap();
    assert!(one_site(&world));
}

#[tokio::test]
async fn a_failover_for_which_no_host_has_room_is_refused_before_any_source_stands() {
    let dir = tempfile::tempdir().unwrap();
    let world = world();
    world.0.lock().unwrap().no_host = true;
    let groups = controller(&world, dir.path());
    let planned = groups.planned(shop(), CUT, &Watcher::nobody()).await.unwrap_err();
    assert!(planned.to_string().contains("nothing was stopped"), "{planned}");
    let refused = groups.emergency(shop(), named(&point(&shop(), CUT)), false, &Watcher::nobody()).await;
    assert!(refused.unwrap_err().to_string().contains("no host"));
    assert_eq!(groups.journal.load_group(shop().id).unwrap(), None);
    let tables = world.0.lock().unwrap();
    assert!(tables.sources.values().all(|source| *source == Source::Runs) && tables.prepared.is_empty());
}
