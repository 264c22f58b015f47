//! Sees to it that one VM's copy does here what it may: looks each second, and at once when the site, libvirt or an
//! operator says something; `decide` says what follows.
//! Promises: a copy that was fenced is paused through libvirt, again and again if need be, whether the site answers or not;
//! it is resumed or started by us only while the site, or an operator, says that it may run. Each step is logged.
//! Called by the daemon, one task per VM that is configured or has a record.

mod bound;

use super::{
    FenceError,
    book::{Book, Fenced, Record},
    decide::{Facts, Guest, Policy, Step, Verdict, decide, verdict},
    diverged::Shelf,
    label,
    lease::Leases,
    words,
};
use crate::{
    capture::{
        guest::{self, GuestSettings},
        others,
    },
    protect::{
        holds::Holds,
        neighbour::{Held, Neighbour, SiteWord, State},
        status::{Board, FenceStatus},
    },
    witness::{
        hold::{Kept, Wish},
        keeping::Keeping,
    },
};
use lifeboat::{
    clock::Clock,
    fault,
    hypervisor::libvirt::{Domain, DomainEvent, DomainState, Happened, Hypervisor, HypervisorError},
    id::VmId,
    units::{Generation, UnixMs},
    wire::message::VmState,
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

/// What all keepers are given.
#[derive(Clone)]
pub struct Tools {
    pub hypervisor: Hypervisor,
    pub book: Book,
    pub leases: Leases,
    pub shelf: Shelf,
    /// Where captures put scratch images.
    pub scratch: PathBuf,
    pub holds: Holds,
    pub board: Board,
    pub clock: Arc<dyn Clock>,
}

impl Tools {
    pub fn open(
        hypervisor: Hypervisor,
        board: Board,
        clock: Arc<dyn Clock>,
        state: &Path,
        run: &Path,
    ) -> io::Result<Self> {
        let (book, leases) = (Book::open(state.join(BOOK))?, Leases::open(state, run)?);
        let holds = Holds::open(state)?;
        let (shelf, scratch) = (Shelf::new(state.join(SHELF)), state.join(GuestSettings::SCRATCH));
        Ok(Self { hypervisor, book, leases, shelf, scratch, holds, board, clock })
    }
}

/// Keeps one VM until told to stop.
pub async fn keep(
    tools: Tools,
    vm: VmId,
    policy: Policy,
    neighbour: Arc<Neighbour>,
    keeping: Option<Arc<Keeping>>,
    mut stop: watch::Receiver<bool>,
) {
    let mut events = tools.hypervisor.subscribe();
    let mut wishes = neighbour.watch();
    let mut keeper = Keeper {
        tools,
        vm,
        policy,
        neighbour,
        keeping,
        domain: None,
        label: None,
        silent_since: Some(Instant::now()),
        try_again: None,
        trouble: None,
        stuck: None,
    };
    loop {
        let looked = tokio::task::spawn_blocking(move || {
            keeper.look();
            keeper
        });
        let Ok(back) = looked.await else { return };
        keeper = back;
        tokio::select! {
            Some(()) = next(&mut events, vm) => {}
            changed = wishes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Waits for an event that may change what is to be done; a point that is cut makes many that do not. `None` once there are
/// no more.
async fn next(events: &mut broadcast::Receiver<DomainEvent>, vm: VmId) -> Option<()> {
    loop {
        match events.recv().await {
            Ok(event) if event.vm.is_some_and(|about| about != vm) => {}
            Ok(event) if matches!(event.happened, Happened::JobChanged | Happened::Unplugged) => {}
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return Some(()),
            Err(broadcast::error::RecvError::Closed) => return None,
        }
    }
}

/// Before anything else at the agent's start, and whether the site answers or not: what was fenced is paused, should
/// somebody have started it meanwhile.
pub fn at_start(
    hypervisor: &Hypervisor,
    book: &Book,
    pauses: impl Fn(&Record, VmId) -> bool,
) -> io::Result<()> {
    for vm in book.vms()? {
        let record = match book.load(vm) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(%vm, %error, "what became of this VM's copy is not known");
                continue;
            }
        };
        let fenced = |label| matches!(verdict(SiteWord::Silent, &record, label), Verdict::Fenced(_));
        if !fenced(None) || !pauses(&record, vm) {
            continue;
        }
        let paused = hypervisor
            .domain_by_uuid(vm)
            .map_err(FenceError::from)
            .and_then(|domain| if fenced(label::of(&domain)?) { pause(&domain) } else { Ok(()) });
        match paused {
            Ok(()) | Err(FenceError::Hypervisor(HypervisorError::NotFound { .. })) => {}
            Err(error) => tracing::error!(%vm, %error, "a copy that was fenced could not be paused yet"),
        }
    }
    Ok(())
}

struct Keeper {
    tools: Tools,
    vm: VmId,
    policy: Policy,
    neighbour: Arc<Neighbour>,
    /// Where a witness is configured.
    keeping: Option<Arc<Keeping>>,
    domain: Option<Domain>,
    /// The failover that put the copy here that there is now, where that matters.
    label: Option<Generation>,
    silent_since: Option<Instant>,
    /// What failed and costs something is not tried again before then.
    try_again: Option<Instant>,
    /// Why something could not be done.
    trouble: Option<String>,
    /// Why nothing could be.
    stuck: Option<String>,
}

impl Keeper {
    fn look(&mut self) {
        // First: a hold ends only after what the site says has changed.
        let held = self.tools.holds.is_held(self.vm);
        let record = match self.tools.book.load(self.vm) {
            Ok(record) => record,
            Err(error) => return self.stuck(&error.to_string()),
        };
        let record = match self.note_guard(record) {
            Ok(record) => record,
            Err(error) => return self.stuck(&error.to_string()),
        };
        let state = self.neighbour.state();
        // An order to end the protection holds until the next start, for the hook as well.
        if state.leave && record.fenced.is_none() {
            self.wish(Wish::Free);
            if let Err(error) = self.tools.leases.unprotect(self.vm) {
                self.stuck(&error.to_string());
            }
            return;
        }
        if state.site == SiteWord::Silent {
            self.silent_since.get_or_insert_with(Instant::now);
        } else {
            self.silent_since = None;
        }
        let guest = match self.guest() {
            Ok(guest) => guest,
            // libvirt is away: what it can't be asked is decided when it is back.
            Err(error) => return self.stuck(&error.to_string()),
        };
        match self.label(&state, &record) {
            Ok(label) => self.label = label,
            Err(error) => return self.stuck(&error.to_string()),
        }
        self.stuck = None;
        self.wish(self.wished(state.site, guest, &record));
        let steps = self.decide(&state, guest, &record, held);
        for step in steps {
            if let Err(error) = self.perform(step, &record) {
                let why = error.to_string();
                if self.trouble.as_ref() != Some(&why) {
                    tracing::warn!(vm = %self.vm, ?step, %why, "fencing: a step did not work");
                }
                self.trouble = Some(why);
                self.try_again = Some(Instant::now() + TRY_AGAIN);
                break;
            }
            self.trouble = None;
        }
        match self.tools.book.load(self.vm) {
            Ok(record) => self.tell(&record, state.site, guest),
            Err(error) => self.stuck(&error.to_string()),
        }
    }

    fn decide(&mut self, state: &State, guest: Guest, record: &Record, held: bool) -> Vec<Step> {
        let now = Instant::now();
        let may_try = self.try_again.is_none_or(|at| now >= at);
        let fenced = record.fenced.as_ref();
        let may_save = may_try
            && guest == Guest::Stands
            && state.aside
            && self.domain.as_ref().is_some_and(|domain| others::somebody(domain).is_none());
        let start_refused = may_try && self.tools.leases.start_was_refused(self.vm);
        let facts = Facts {
            site: state.site,
            silent_for: self.silent_since.map_or(Duration::ZERO, |since| now - since),
            guest,
            label: self.label,
            record,
            lease: self.tools.leases.look(self.vm, self.policy.isolation),
            start_refused,
            autostart: start_refused
                && self.domain.as_ref().is_some_and(|domain| domain.autostart().unwrap_or(false)),
            may_save,
            saved_unnoted: fenced.is_some_and(|fenced| {
                fenced.saved.is_none() && self.tools.shelf.whole(self.vm, fenced.current).is_some()
            }),
            held,
            kept: self.keeping.as_ref().map_or(Kept::Unbound, |keeping| keeping.kept()),
        };
        decide(&facts, self.policy)
    }

    fn guest(&mut self) -> Result<Guest, HypervisorError> {
        if self.domain.is_none() {
            self.domain = match self.tools.hypervisor.domain_by_uuid(self.vm) {
                Err(HypervisorError::NotFound { .. }) => return Ok(Guest::Off),
                found => Some(found?),
            };
        }
        let Some(domain) = &self.domain else { return Ok(Guest::Off) };
        match domain.state() {
            Err(HypervisorError::NotFound { .. }) => {
                self.domain = None;
                Ok(Guest::Off)
            }
            Err(error) => Err(error),
            Ok(DomainState::Paused) if domain.is_held_by_libvirt()? => Ok(Guest::Stands),
            Ok(DomainState::Paused) => Ok(Guest::Cut),
            Ok(state) if state.is_active() => Ok(Guest::Runs),
            Ok(_) => Ok(Guest::Off),
        }
    }

    /// It matters only where this copy may be the fenced one.
    fn label(&self, state: &State, record: &Record) -> Result<Option<Generation>, HypervisorError> {
        let fenced = record.fenced.is_some() || matches!(state.site, SiteWord::Fenced(_));
        match self.domain.as_ref().filter(|_| fenced).map(label::of).transpose() {
            Err(HypervisorError::NotFound { .. }) => Ok(None),
            found => Ok(found?.flatten()),
        }
    }

    fn perform(&mut self, step: Step, record: &Record) -> Result<(), FenceError> {
        let (vm, now) = (self.vm, self.tools.clock.now());
        match step {
            Step::RefuseStarts(current) => {
                tracing::error!(%vm, %current, "this VM was failed over: its copy here is fenced");
                self.tools.leases.refuse(vm, current).map_err(lease_error)?;
                fault::point("fence.refused");
            }
            Step::NoteFenced(current) => {
                let name = self.name(record);
                let noted = self.change(|record| {
                    record.name = name;
                    let saved = record.fenced.take().and_then(|fenced| fenced.saved);
                    record.fenced = Some(Fenced { current, at: now, saved });
                });
                // A full disk must not keep a fenced guest running.
                if let Err(error) = noted {
                    tracing::error!(%vm, %error, "that this copy is fenced could not be noted; it is paused all the same");
                    self.trouble = Some(error.to_string());
                }
                fault::point("fence.noted");
            }
            Step::ForgetFenced => {
                tracing::info!(%vm, "the site has given this VM back to this host: its copy is not fenced any more");
                self.change(|record| record.fenced = None)?;
            }
            Step::NoteIsolated => {
                let name = self.name(record);
                self.change(|record| (record.name, record.isolated) = (name, Some(now)))?;
                fault::point("fence.isolated");
            }
            Step::ForgetIsolated => self.change(|record| record.isolated = None)?,
            Step::ForgetAllowed => self.change(|record| record.allowed = None)?,
            Step::WriteLease => self.tools.leases.grant(vm, self.policy.isolation).map_err(lease_error)?,
            Step::DropLease => self.tools.leases.drop(vm).map_err(lease_error)?,
            Step::ForgetRefusal => self.tools.leases.forget_refusal(vm).map_err(lease_error)?,
            Step::NoteSaved => self.note_saved(record)?,
            Step::Pause | Step::Resume | Step::Save | Step::Start => self.act(step, record, now)?,
        }
        Ok(())
    }

    /// What is done to the guest itself.
    fn act(&self, step: Step, record: &Record, now: UnixMs) -> Result<(), FenceError> {
        let (vm, Some(domain)) = (self.vm, &self.domain) else { return Ok(()) };
        match step {
            Step::Pause => {
                // Nothing begins meanwhile, and a point that is being cut is given up.
                self.neighbour.hold(Some(Held { state: VmState::Fenced, why: PAUSING.into() }));
                pause(domain)?;
                tracing::warn!(%vm, "paused: it may run elsewhere");
            }
            Step::Resume => {
                domain.resume()?;
                tracing::info!(%vm, "it may go on: resumed");
                fault::point("fence.resumed");
            }
            Step::Save => {
                if let Some(fenced) = &record.fenced {
                    // Also what an agent left that died in a cut, as the failover came: no guest can be saved with it.
                    guest::clear(&self.tools.hypervisor, vm, self.tools.scratch.clone())?;
                    let folder = self.tools.shelf.save(domain, fenced.current, now)?;
                    tracing::warn!(%vm, folder = %folder.display(), "its diverged state is kept; it does not run any more");
                    self.note_saved(record)?;
                }
            }
            Step::Start => {
                domain.start()?;
                tracing::info!(%vm, "its start had been refused; the site has answered, and it was started");
                fault::point("fence.started");
            }
            _ => {}
        }
        Ok(())
    }

    fn note_saved(&self, record: &Record) -> Result<(), FenceError> {
        let Some(fenced) = &record.fenced else { return Ok(()) };
        let folder = self.tools.shelf.folder(self.vm, fenced.current);
        self.change(|record| {
            if let Some(fenced) = &mut record.fenced {
                fenced.saved = Some(folder);
            }
        })
    }

    fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), FenceError> {
        let updated = self.tools.book.update(self.vm, change);
        updated
            .map(drop)
            .map_err(|source| FenceError::File { what: "noting what became of this copy", source })
    }

    fn name(&self, record: &Record) -> String {
        self.domain.as_ref().map_or_else(|| record.name.clone(), |domain| domain.name().to_owned())
    }

    /// Nothing can be decided: everything stays as it is, and says why.
    fn stuck(&mut self, why: &str) {
        if self.stuck.as_deref() != Some(why) {
            tracing::warn!(vm = %self.vm, why, "whether this copy may run can't be seen to now");
            self.stuck = Some(why.to_owned());
        }
    }

    /// Says what holds now, to the protection and to whoever asks for status.
    fn tell(&self, record: &Record, site: SiteWord, guest: Guest) {
        let verdict = verdict(site, record, self.label);
        let what = self.words(record, verdict, guest);
        let held = match verdict {
            Verdict::Fenced(_) if self.policy.pause_fenced => Some(VmState::Fenced),
            _ if record.isolated.is_some() => Some(VmState::Degraded),
            _ => None,
        };
        let held = held.zip(what.clone()).map(|(state, why)| Held { state, why });
        self.neighbour.hold(held);
        let fenced = record.fenced.as_ref();
        self.tools.board.put_fence(
            self.vm,
            FenceStatus {
                verdict: match verdict {
                    Verdict::Owner => "owner",
                    Verdict::Allowed => "allowed",
                    Verdict::Replica(_) => "replica",
                    Verdict::Fenced(_) => "fenced",
                    Verdict::Unsure => "unsure",
                }
                .into(),
                lease: verdict_of_lease(&self.tools.leases, self.vm, self.policy),
                since: fenced.map(|fenced| fenced.at).or(record.isolated),
                what,
                witness: self.keeping.as_ref().map(|keeping| words::of_witness(keeping)),
                generation: fenced.map(|fenced| fenced.current.0),
                diverged: fenced
                    .and_then(|fenced| fenced.saved.as_ref())
                    .map(|folder| folder.display().to_string()),
            },
        );
    }

    fn words(&self, record: &Record, verdict: Verdict, guest: Guest) -> Option<String> {
        let said = words::say(&self.name(record), record, verdict, guest, self.policy);
        match (said, self.trouble.as_ref()) {
            (Some(said), Some(trouble)) => Some(format!("{said}; {trouble}")),
            (said, trouble) => said.or(trouble.cloned()),
        }
    }
}

fn verdict_of_lease(leases: &Leases, vm: VmId, policy: Policy) -> bool {
    use super::decide::Lease;
    matches!(leases.look(vm, policy.isolation), Lease::Fresh | Lease::Stale)
}

/// Through libvirt, which then knows that nobody else is to resume it. A pause of our own that is under way would end in
/// a resume: it is waited for, and the guest paused again.
pub fn pause(domain: &Domain) -> Result<(), FenceError> {
    let until = Instant::now() + PAUSE_WITHIN;
    loop {
        if !domain.state()?.is_active() || domain.is_held_by_libvirt()? {
            return Ok(());
        }
        if domain.state()? != DomainState::Paused {
            domain.suspend()?;
        }
        if domain.is_held_by_libvirt()? {
            fault::point("fence.paused");
            return Ok(());
        }
        if Instant::now() > until {
            return Err(FenceError::NotPaused(PAUSE_WITHIN.as_secs()));
        }
        std::thread::sleep(PAUSE_AGAIN);
    }
}

fn lease_error(source: io::Error) -> FenceError {
    FenceError::File { what: "writing the VM's lease", source }
}

pub(super) const BOOK: &str = "fence";
pub(super) const SHELF: &str = "diverged";
const PAUSING: &str = "this copy may run elsewhere; it is being paused";
const LOOK: Duration = Duration::from_secs(1);
const TRY_AGAIN: Duration = Duration::from_secs(15);
const PAUSE_WITHIN: Duration = Duration::from_secs(10);
const PAUSE_AGAIN: Duration = Duration::from_millis(10);
