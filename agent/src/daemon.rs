//! The daemon: releases what a predecessor left paused, wires the rooms, protects what is configured, stops in order.

mod assigned;
mod at_witness;

use self::at_witness::AtWitness;
use crate::{
    admin,
    capture::guest::{self, GuestSettings, GuestSource},
    config::{AgentConfig, VmConfig},
    fence::{
        decide::Policy,
        keeper::{self, Tools},
        orders::Orders,
    },
    protect::{
        assignments::Assignments,
        generations::Generations,
        holds::Holds,
        lookout,
        neighbour::{Book, Neighbour, Neighbours},
        status::{Board, VmStatus},
        touched::Touched,
        vm::{Protection, Settings},
    },
    ship::{
        base_cache::BaseCache,
        budget::{Budget, Lanes},
        inventory::Inventory,
        limit::{Limits, Plan},
        uplink::{Routes, Uplink},
    },
    watchdog::{self, Markers, Watchdog, WatchdogArgs},
    witness::files::Files,
};
use anyhow::Context;
use lifeboat::{
    clock::{Clock, SystemClock},
    hypervisor::libvirt::{Domain, Hypervisor, HypervisorError},
    id::{PointId, VmId},
    local_api::LocalListener,
    transport::pki::AgentIdentity,
    wire::message::VmState,
};
use std::{fs, io, os::unix::fs::DirBuilderExt, path::Path, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

/// How often a VM that libvirt does not know is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How long protection may take to put back what is under way, at the end.
const FAREWELL: Duration = Duration::from_secs(20);
/// A point whose link has been down for so long is put back: its views stop growing.
const PATIENCE: Duration = Duration::from_secs(30);
/// Groups being compressed by all VMs together, for each CPU. One VM alone gets half of them.
const LANES_PER_CPU: usize = 4;

/// What every VM's protection is given.
#[derive(Clone)]
struct Rooms {
    config: Arc<AgentConfig>,
    hypervisor: Hypervisor,
    watchdog: Arc<Watchdog>,
    generations: Generations,
    touched: Touched,
    yields: Book,
    assignments: Assignments,
    holds: Holds,
    neighbours: Neighbours,
    fence: Tools,
    routes: Routes,
    board: Board,
    bases: Arc<BaseCache>,
    clock: Arc<dyn Clock>,
    limits: Arc<Limits>,
    budget: Budget,
    lanes: Lanes,
    witness: Option<AtWitness>,
    stop: watch::Receiver<bool>,
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: AgentConfig, file: &Path) -> anyhow::Result<()> {
    let site = config
        .site
        .clone()
        .context("no site is configured: write `[site]` with `address = \"HOST:PORT\"`")?;
    let identity = AgentIdentity::load(&config.identity_dir())
        .context("this host is not enrolled; run `lifeboat-agent enrol --site HOST:PORT TOKEN` first")?;
    for (dir, mode) in [(&config.state_dir, 0o711), (&config.run_dir, 0o755), (&config.marker_dir(), 0o700)] {
        make_dir(dir, mode)?;
    }
    let watch_args = WatchdogArgs { uri: config.libvirt.clone(), marker_dir: config.marker_dir() };
    let config = Arc::new(config);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let board = Board::default();
    let (args, given, shared) = (watch_args.clone(), config.clone(), (board.clone(), clock.clone()));
    let fence = tokio::task::spawn_blocking(move || -> anyhow::Result<Tools> {
        // Before anything else: no guest stays paused because an agent before us died.
        release_paused(&args, false);
        let hypervisor = Hypervisor::connect(&given.libvirt)?;
        let tools = Tools::open(hypervisor, shared.0, shared.1, &given.state_dir, &given.run_dir)?;
        // And none runs on that was failed over.
        keeper::at_start(&tools.hypervisor, &tools.book, |record, vm| {
            policy_of(&given, &record.name, vm).pause_fenced
        })?;
        Ok(tools)
    })
    .await??;
    let (order, stop) = watch::channel(false);
    let cpus = std::thread::available_parallelism().map_or(1, Into::into);
    let rooms = Rooms {
        hypervisor: fence.hypervisor.clone(),
        watchdog: Arc::new(Watchdog::spawn(&watch_args)?),
        generations: Generations::open(config.state_dir.join("generations"))?,
        touched: Touched::open(config.state_dir.join("touched"))?,
        yields: Book::open(config.run_dir.join("yields"))?,
        assignments: Assignments::open(config.state_dir.join("assignments"))?,
        holds: fence.holds.clone(),
        fence,
        neighbours: Neighbours::default(),
        routes: Routes::default(),
        board,
        bases: Arc::new(BaseCache::new(config.memory_budget.0)),
        limits: Arc::new(Limits::new(plan(&config), clock.clone())),
        budget: Budget::new(config.buffers.0),
        lanes: Lanes::new(LANES_PER_CPU * cpus),
        clock,
        witness: at_witness::open(&config, identity.name().as_str())?,
        stop: stop.clone(),
        config: config.clone(),
    };
    let uplink = Uplink {
        address: site,
        identity,
        settings: config.transport.clone(),
        host: host_name(),
        limits: rooms.limits.clone(),
        routes: rooms.routes.clone(),
        inventory: Inventory { hypervisor: rooms.hypervisor.clone(), only: config.offered() },
        assignments: rooms.assignments.clone(),
        board: rooms.board.clone(),
        stop: stop.clone(),
    };
    let socket = LocalListener::bind(&config.socket(), 0o660)?;
    let mut stopped = stop.clone();
    let api = tokio::spawn(socket.serve(
        admin::router(rooms.board.clone(), rooms.clock.clone(), rooms.neighbours.clone()),
        async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        },
    ));
    let assigned: Vec<String> = rooms.assignments.all().keys().map(ToString::to_string).collect();
    let mut configured: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    configured.extend(assigned.iter().map(String::as_str));
    for orphan in
        rooms.touched.no_longer_named(&configured).context("looking for VMs that are no longer protected")?
    {
        tokio::spawn(leave(rooms.clone(), orphan));
    }
    keep_others(&rooms, &configured)?;
    at_witness::free_others(&rooms, &configured)?;
    let mut protections = JoinSet::new();
    for vm in config.vms.clone() {
        protections.spawn(protect(rooms.clone(), vm));
    }
    protections.spawn(assigned::protect_assigned(rooms.clone()));
    let mut link = tokio::spawn(uplink.run());
    // Outside systemd there is nobody to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    until_told(&mut protections, || reload(file, &rooms.limits)).await?;
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = order.send(true);
    let farewell = async { while protections.join_next().await.is_some() {} };
    if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
        tracing::warn!(
            "some protection did not end in time; what it left in QEMU is put in order at the next start"
        );
    }
    link.abort();
    let _ = (&mut link).await;
    api.await??;
    Ok(())
}

/// Resumes what an agent before us left paused; what can't be resumed is said. See [`watchdog::release_paused`].
pub fn release_paused(args: &WatchdogArgs, wait: bool) {
    for (vm, released) in watchdog::release_paused(&Markers::new(args.marker_dir.clone()), &args.uri, wait) {
        match released {
            Ok(done) => tracing::warn!(%vm, ?done, "found a guest that an agent had not let go"),
            Err(error) => {
                tracing::error!(%vm, %error, "a guest that an agent paused or froze could not be let go")
            }
        }
    }
}

/// Waits for a signal to stop, and reloads at each one to do that; protections that die in the meantime are named.
async fn until_told(protections: &mut JoinSet<()>, reload: impl Fn()) -> anyhow::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = hup.recv() => reload(),
            _ = term.recv() => return Ok(()),
            _ = int.recv() => return Ok(()),
            Some(ended) = protections.join_next() => {
                // The service manager starts us again, and everything is owed as it was.
                ended.context("the protection of a VM died")?;
            }
        }
    }
}

/// SIGHUP: the limits of the configuration hold from now on; everything else in it, from the next start.
fn reload(file: &Path, limits: &Limits) {
    match AgentConfig::load(file) {
        Ok((config, unknown)) => {
            lifeboat::config::warn_of(&unknown);
            let of_vm = |name: &str| config.vms.iter().find(|vm| vm.name == name).and_then(|vm| vm.limit);
            limits.replace(plan(&config), of_vm);
            tracing::info!("the configuration's bandwidth limits were read again");
        }
        Err(error) => {
            let why = lifeboat::error::chain(&error);
            tracing::error!(%why, "the configuration can't be read again; the limits stay as they were");
        }
    }
}

fn plan(config: &AgentConfig) -> Plan {
    Plan { link: config.limit, windows: config.windows.clone() }
}

/// Protects one configured VM, as soon as libvirt knows it.
async fn protect(rooms: Rooms, vm: VmConfig) {
    let Some(domain) = find(&rooms, &vm).await else { return };
    let id = domain.uuid();
    let generation = match rooms.generations.load(id) {
        Ok(generation) => generation,
        Err(error) => {
            refuse(&rooms, id, &vm, &error.to_string());
            return;
        }
    };
    // Remembered first: whatever is left in its QEMU from here on is taken away even by an agent that knows it no more.
    if let Err(error) = rooms.touched.add(id, &vm.name) {
        refuse(&rooms, id, &vm, &format!("it could not be noted that this VM is protected here: {error}"));
        return;
    }
    let known_as = if vm.name == id.to_string() { domain.name() } else { &vm.name };
    if let Err(error) = rooms.fence.leases.protect(id, known_as) {
        refuse(&rooms, id, &vm, &format!("it could not be noted for libvirt's hook: {error}"));
        return;
    }
    let neighbour = Arc::new(Neighbour::open(id, Some(rooms.yields.clone())));
    rooms.neighbours.insert(domain.name(), neighbour.clone());
    let (policy, stop) = (policy_of(&rooms.config, &vm.name, id), rooms.stop.clone());
    let (under, kept) = at_witness::keep(&rooms, id, &neighbour);
    let keeping = tokio::spawn(keeper::keep(rooms.fence.clone(), id, policy, neighbour.clone(), under, stop));
    let seeing = lookout::watch(rooms.hypervisor.clone(), id, neighbour.clone(), rooms.stop.clone());
    let seeing = tokio::spawn(seeing);
    let state = &rooms.config.state_dir;
    let settings = GuestSettings {
        vm: id,
        name: domain.name().to_owned(),
        memory: vm.memory,
        engine: vm.engine,
        scratch_dir: state.join(GuestSettings::SCRATCH),
        rest_dir: state.join("off"),
        run_dir: rooms.config.run_dir.clone(),
        spool_dir: state.join("spool"),
        staging_bytes: usize::try_from(rooms.config.staging_of(&vm, rooms.assignments.all().len()).0)
            .unwrap_or(usize::MAX),
        marker_dir: rooms.config.marker_dir(),
        pause_limit: vm.max_pause,
        freeze_limit: vm.freeze_limit,
    };
    for (dir, mode) in [(&settings.scratch_dir, 0o711), (&settings.spool_dir, 0o700)] {
        if let Err(error) = make_dir(dir, mode) {
            refuse(&rooms, id, &vm, &format!("{error:#}"));
            return;
        }
    }
    let source =
        GuestSource::new(rooms.hypervisor.clone(), rooms.watchdog.clone(), rooms.clock.clone(), settings);
    rooms.limits.set_vm(id, &vm.name, vm.limit);
    let book = rooms.generations.clone();
    let protection = Protection {
        vm: id,
        name: domain.name().to_owned(),
        source,
        settings: Settings {
            interval: vm.interval,
            max_pause: vm.max_pause,
            consistency: vm.consistency,
            compression: rooms.config.compression,
            lanes: rooms.lanes.clone(),
            budget: rooms.budget.clone(),
            patience: PATIENCE,
        },
        generation,
        link: rooms.routes.join(id),
        clock: rooms.clock.clone(),
        new_point: Box::new(|| PointId::from_bytes(*uuid::Uuid::new_v4().as_bytes())),
        on_generation: Box::new(move |vm, generation| {
            if let Err(error) = book.save(vm, generation) {
                tracing::error!(%vm, %error, "the VM's generation could not be remembered");
            }
        }),
        board: rooms.board.clone(),
        bases: rooms.bases.clone(),
        wish: rooms.assignments.watch(id),
        holds: rooms.holds.clone(),
        neighbour,
        stop: rooms.stop.clone(),
    };
    protection.run().await;
    seeing.abort();
    // It ends by itself at the same order to stop; what it is at comes to its end.
    if let Err(panic) = keeping.await {
        tracing::error!(vm = %vm.name, %panic, "the keeper of a VM died");
    }
    if let Err(panic) = kept.await {
        tracing::error!(vm = %vm.name, %panic, "what keeps a VM at the witness died");
    }
    rooms.routes.leave(id);
    rooms.neighbours.remove(id);
}

/// What the operator wants of a VM's copy: the configuration's word; of one that it does not name, what is safe.
fn policy_of(config: &AgentConfig, name: &str, vm: VmId) -> Policy {
    let id = vm.to_string();
    let meant = config.vms.iter().find(|vm| vm.name == name || vm.name == id);
    meant.map_or(Policy { pause_fenced: true, isolation: None }, |vm| Policy {
        pause_fenced: vm.pause_fenced,
        isolation: vm.isolation,
    })
}

/// Keeps the copies that are fenced and not protected any more. The others that were protected once are taken off the
/// hook's list.
fn keep_others(rooms: &Rooms, protected: &[&str]) -> anyhow::Result<()> {
    let is_protected =
        |name: &str, vm: VmId| protected.iter().any(|known| *known == name || *known == vm.to_string());
    for (vm, name) in rooms.fence.leases.protected().context("listing protected VMs")? {
        if !is_protected(&name, vm) && !rooms.holds.is_held(vm) {
            keep_if_fenced(rooms, vm, &name).context("taking a VM off the list of the protected")?;
        }
    }
    Ok(())
}

/// Of a VM that is no longer protected.
fn keep_if_fenced(rooms: &Rooms, vm: VmId, name: &str) -> io::Result<()> {
    // One that can't be read is taken to be fenced.
    if rooms.fence.book.load(vm).is_ok_and(|record| record.fenced.is_none()) {
        return rooms.fence.leases.unprotect(vm);
    }
    tracing::warn!(%vm, %name, "it is not protected any more, and fenced: it stays so until `lifeboat-agent allow`");
    let neighbour = Arc::new(Neighbour::open(vm, None));
    // Nobody protects it: nothing more of ours gets into its QEMU.
    neighbour.set_aside(true);
    let policy = policy_of(&rooms.config, name, vm);
    tokio::spawn(keeper::keep(rooms.fence.clone(), vm, policy, neighbour, None, rooms.stop.clone()));
    Ok(())
}

/// Takes everything of ours out of a VM that is no longer configured, as soon as libvirt lets us.
async fn leave(rooms: Rooms, vm: VmId) {
    let mut stop = rooms.stop.clone();
    loop {
        let (hypervisor, scratch) =
            (rooms.hypervisor.clone(), rooms.config.state_dir.join(GuestSettings::SCRATCH));
        let left = tokio::task::spawn_blocking(move || guest::leave(&hypervisor, vm, scratch)).await;
        match left {
            Ok(Ok(ran)) => {
                tracing::info!(%vm, ran, "this VM is no longer protected; nothing of ours is left in it");
                if let Err(error) = rooms.touched.remove(vm) {
                    tracing::warn!(%vm, %error, "its record could not be removed");
                }
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(%vm, %error, "a VM that is no longer protected can't be left yet")
            }
            Err(panic) => tracing::error!(%vm, %panic, "leaving a VM failed"),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Looks for the VM until libvirt knows it, or the daemon stops.
async fn find(rooms: &Rooms, vm: &VmConfig) -> Option<Domain> {
    let mut stop = rooms.stop.clone();
    let unknown = VmId::from_bytes([0; 16]);
    loop {
        let (hypervisor, name) = (rooms.hypervisor.clone(), vm.name.clone());
        let reason = match tokio::task::spawn_blocking(move || hypervisor.domain(&name)).await {
            Ok(Ok(domain)) => return Some(domain),
            Ok(Err(HypervisorError::NotFound { .. })) => {
                format!("libvirt knows no VM `{}`; `virsh list --all` shows those it knows", vm.name)
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        };
        let mut status = VmStatus::new(unknown, vm.name.clone(), vm.interval.as_millis() as u64);
        (status.state, status.reason) = (VmState::NotRunning, Some(reason));
        rooms.board.put(status);
        tokio::select! {
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            _ = stop.wait_for(|stop| *stop) => return None,
        }
    }
}

fn refuse(rooms: &Rooms, id: VmId, vm: &VmConfig, reason: &str) {
    tracing::error!(vm = %vm.name, reason, "the VM is not protected");
    let mut status = VmStatus::new(id, vm.name.clone(), vm.interval.as_millis() as u64);
    (status.state, status.reason) = (VmState::Refused, Some(reason.to_owned()));
    rooms.board.put(status);
}

fn make_dir(dir: &Path, mode: u32) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(dir);
    made.with_context(|| format!("creating {}", dir.display()))
}

/// Takes everything of ours out of a VM's QEMU while no agent runs; `false` if the VM does not run.
pub fn leave_now(config: &AgentConfig, name: &str) -> anyhow::Result<bool> {
    let hypervisor = Hypervisor::connect(&config.libvirt)?;
    let vm = hypervisor.domain(name)?.uuid();
    let bound = Files::open(&config.state_dir, &config.run_dir)?.is_bound(vm);
    anyhow::ensure!(
        !bound,
        "{name} is bound to the witness; start the agent, which can free it, and try again"
    );
    let ran = guest::leave(&hypervisor, vm, config.state_dir.join(GuestSettings::SCRATCH))?;
    let touched = Touched::open(config.state_dir.join("touched")).and_then(|touched| touched.remove(vm));
    touched.context("removing the VM's record")?;
    Orders::open(&config.state_dir, &config.run_dir)?.unprotect(vm)?;
    Ok(ran)
}

pub fn host_name() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.nodename().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown".into())
}
