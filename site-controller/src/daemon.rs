//! The daemon: opens what is there, wires the rooms, says that it is ready, and stops in order.

use crate::{
    api::{audit::AuditLog, gate::Gate, routes, site::Site, token_book::TokenBook},
    automatic::{Automatic, Parts, record::ClaimBook},
    catalog::{Catalog, SledIndex},
    config::SiteConfig,
    drill::{DrillBook, Driller},
    failover::{group::Groups, hosts::Hosts, journal::Journal, runbook::Runbook, stonith::Stonith},
    group::{Book, coordinator::Coordinator, points::GroupPoints},
    handover::Handovers,
    intake::{
        compare::Comparisons,
        listener::{Enrolment, listen},
        session::Intake,
        slot::Slots,
    },
    readiness::{judge::Judge, watch::Watch},
    report::{log::SlotLog, recorder::keep_recording},
    retention::keeper::Keeper,
    seed::{Here, Seeder},
    store::{LocalObjects, Objects, RandomIds, Store, StoreOptions},
};
use anyhow::Context;
use lifeboat::{
    clock::{Clock, SystemClock},
    local_api::{HttpsListener, LocalListener},
    transport::{SiteEndpoint, enrol::EnrolmentTokens, https::HttpsIdentity, pki::SiteIdentity},
    witness::etcd::Etcd,
};
use std::{fs, os::unix::fs::DirBuilderExt, path::Path, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: SiteConfig) -> anyhow::Result<()> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let identity = SiteIdentity::load(&config.identity_dir()).context(
        "this site has no identity yet; run `lifeboat-site-controller init --address HOST` once, where HOST is the name or \
         IP address under which agents reach this machine",
    )?;
    for dir in [&config.data_dir, &config.replica_dir, &config.run_dir] {
        make_dir(dir)?;
    }
    let objects: Arc<dyn Objects> = Arc::new(
        LocalObjects::open(&config.data_dir.join("store"), config.reserve)
            .await
            .context("opening the store")?,
    );
    let index = Arc::new(SledIndex::new(&config.data_dir.join("index")));
    let (store, found) =
        Store::open(objects, clock.clone(), Arc::new(RandomIds), index, StoreOptions::default())
            .await
            .context("opening the store")?;
    for finding in &found.findings {
        tracing::warn!(%finding, "found when opening the store");
    }
    tracing::info!(points = found.points, "store is open");
    let findings = found.findings.iter().map(ToString::to_string).collect();

    let slots = Slots::new(store.clone());
    let comparisons = Comparisons::new(store.clone(), config.data_dir.clone());
    let intake = Arc::new(Intake::new(config.name.clone(), slots, comparisons, clock.clone()));
    let book = Arc::new(Book::open(config.data_dir.join("groups"))?);
    let group_points = Arc::new(GroupPoints::open(config.data_dir.join("group-points"), store.clone())?);
    let coordinator =
        Arc::new(Coordinator::new(book.clone(), group_points.clone(), intake.clone(), clock.clone()));
    let journal = Journal::open(config.data_dir.join("failovers"))?;
    let keeper = Keeper::new(store.clone(), config.keep.clone(), journal.clone());
    let keeper = Arc::new(keeper.of_groups(book, group_points));
    let configured = config.hosts.clone();
    let hosts = tokio::task::spawn_blocking(move || Hosts::connect(&configured)).await?;
    let hosts = Arc::new(hosts.context("libvirt is needed to start replicas")?);
    let seeder = Seeder {
        store: store.clone(),
        here: Some(Here {
            hosts: hosts.clone(),
            journal: journal.clone(),
            replica_dir: config.replica_dir.clone(),
        }),
        run_dir: config.run_dir.clone(),
        scratch_dir: config.data_dir.clone(),
    };
    let mut runbook = Runbook::new(
        store.clone(),
        Catalog::new(store),
        intake.clone(),
        hosts,
        journal,
        config.replica_dir.clone(),
        clock.clone(),
    );
    runbook.stonith = Stonith { command: config.fence_command.clone(), limit: config.fence_timeout };
    runbook.guest_hook.clone_from(&config.guest_hook);
    runbook.site.clone_from(&config.name);
    runbook.recall_promises().context("reading journals of failovers")?;
    let runbook = Arc::new(runbook);
    let runbook_of_undos = runbook.clone();
    let hosts = runbook.hosts.clone();
    tokio::spawn(async move { hosts.sweep_looks().await });

    let group_failovers =
        Arc::new(Groups::new(runbook.clone(), coordinator.clone(), runbook.journal.clone(), clock.clone()));
    for record in runbook.journal.unfinished_groups()? {
        let unfinished = group_failovers.clone();
        // What a controller before us had not committed is called off; what it had goes on.
        tokio::spawn(async move { unfinished.settle(record.group.id).await });
    }
    let drills =
        DrillBook::open(config.data_dir.join("drills")).context("reading what is remembered of drills")?;
    let driller = Arc::new(Driller::new(runbook.clone(), coordinator.clone(), drills));
    let handovers = Handovers { site: config.name.clone(), runbook: runbook.clone(), seeder: seeder.clone() };

    let endpoint = SiteEndpoint::bind(config.listen, &identity, &config.transport)?;
    tracing::info!(listen = %endpoint.local_address()?, site = %config.name, "taking agents");
    let refused = Box::new(endpoint.refusal_counter());
    let tokens = EnrolmentTokens::open(&config.identity_dir(), identity.fingerprint(), clock.clone());
    let certificate_expires = identity.expires();
    let https = https(&config, &identity).await?;
    let gate = Arc::new(Gate {
        tokens: TokenBook::open(&config.data_dir, clock.clone())?,
        audit: Arc::new(AuditLog::open(&config.data_dir, clock.clone())?),
    });
    let enrolment = Arc::new(Enrolment { identity, tokens, clock });
    let socket = LocalListener::bind(&config.socket(), 0o660)?;
    let (order, stop) = watch::channel(false);
    let leading = tokio::spawn(coordinator.clone().run(stop.clone()));
    let keeping = tokio::spawn(keeper.clone().run(stop.clone()));
    let readiness = Arc::new(Watch::new(Judge {
        runbook: runbook.clone(),
        coordinator: coordinator.clone(),
        driller: driller.clone(),
        reserve: config.reserve.0,
        certificate_expires,
    }));
    let automatic = automatic(&config, &runbook, &coordinator, &group_failovers, &readiness, &gate)?;
    let (watching, stopping) = (readiness.clone(), stop.clone());
    let watching = tokio::spawn(async move { watching.run(stopping).await });
    // Not waited for at the end: what a drill has made by then is removed at the next start.
    tokio::spawn(driller.clone().keep_schedule(stop.clone()));
    let (stopping, data_dir) = (stop.clone(), config.data_dir.clone());
    let site = Arc::new(Site {
        config,
        gate,
        runbook,
        keeper,
        coordinator,
        group_failovers,
        driller: driller.clone(),
        seeder,
        readiness,
        slots: SlotLog::new(data_dir.join("ages")),
        handovers,
        automatic: automatic.clone(),
        stop: stopping,
        certificate_expires,
        refused,
        findings,
    });

    let recording = tokio::spawn(recording(site.clone(), stop.clone()));
    let listener = tokio::spawn(listen(endpoint, intake, enrolment, stop.clone()));
    let router = routes::router(site);
    let stopped = |mut stop: watch::Receiver<bool>| async move {
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let remote = https.map(|https| tokio::spawn(https.serve(router.clone(), stopped(stop.clone()))));
    let api = tokio::spawn(socket.serve(router, stopped(stop.clone())));
    tokio::spawn(tidying(runbook_of_undos));
    if let Some(automatic) = automatic {
        // Not waited for at the end: what it has begun is taken up at the next start.
        tokio::spawn(automatic.run(stop.clone()));
    }
    // Outside systemd there is nobody to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    until_told().await?;
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = order.send(true);
    listener.await?;
    keeping.await?;
    leading.await?;
    watching.await?;
    recording.await?;
    api.await??;
    if let Some(remote) = remote {
        remote.await?;
    }
    Ok(())
}

/// Failovers by itself, where the configuration has a witness.
fn automatic(
    config: &SiteConfig,
    runbook: &Arc<Runbook>,
    coordinator: &Arc<Coordinator>,
    groups: &Arc<Groups>,
    readiness: &Arc<Watch>,
    gate: &Arc<Gate>,
) -> anyhow::Result<Option<Arc<Automatic>>> {
    let book = ClaimBook::open(config.data_dir.join("automatic"))?;
    let Some(witness) = &config.witness else {
        let left = book.all()?;
        anyhow::ensure!(
            left.is_empty(),
            "a claim at the witness is not done with, and site.toml has no [witness]"
        );
        return Ok(None);
    };
    let automatic = Automatic::open(Parts {
        site: config.name.clone(),
        witness: Arc::new(Etcd::new(witness).context("the witness")?),
        runbook: runbook.clone(),
        coordinator: coordinator.clone(),
        groups: groups.clone(),
        readiness: readiness.clone(),
        scribe: Arc::new(gate.audit.clone()),
        book,
        silent: witness.silent,
    });
    Ok(Some(Arc::new(automatic.context("what is remembered of claims")?)))
}

/// What the report is going to need of points that go.
async fn recording(site: Arc<Site>, stop: watch::Receiver<bool>) {
    keep_recording(site.sources(), stop).await;
}

/// The port for operators elsewhere, where the configuration has one.
async fn https(config: &SiteConfig, identity: &SiteIdentity) -> anyhow::Result<Option<HttpsListener>> {
    let Some(api) = &config.api else { return Ok(None) };
    let shown = match &api.files {
        Some((certificate, key)) => HttpsIdentity::from_files(certificate, key),
        None => HttpsIdentity::of_site(identity),
    };
    let listener = HttpsListener::bind(api.listen, shown.context("the API's certificate")?).await?;
    tracing::info!(listen = %listener.local_address()?, "taking operators");
    Ok(Some(listener))
}

/// Removes what undos have set aside once their windows are over.
async fn tidying(runbook: Arc<Runbook>) {
    loop {
        if let Err(error) = runbook.tidy_aside().await {
            tracing::warn!(%error, "what an undo has set aside could not be removed");
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}

async fn until_told() -> anyhow::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}

/// libvirt's QEMU must be able to pass through a replica's folder, and nobody to list it.
fn make_dir(dir: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.with_context(|| format!("creating {}", dir.display()))
}
