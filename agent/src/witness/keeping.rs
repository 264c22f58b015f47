//! Keeps one VM at the witness: renews, takes, frees, each second, and hears what the site promises. Promises:
//! [`Keeping::kept`] is never more than what was answered allows; whatever fails is tried again, and told. One task per
//! protected VM where a witness is configured, started by `daemon`; asked by `fence`.

use super::{
    files::Files,
    hold::{Act, Hold, Kept, Known, Until, Wish, act},
};
use crate::{
    protect::neighbour::{Neighbour, SiteWord},
    ship::uplink::Routes,
};
use lifeboat::{
    boot, fault,
    id::VmId,
    units::Generation,
    witness::{Change, LeaseId, Leasing, Revision, Witness, WitnessError, Word},
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// One VM's.
pub struct Keeping {
    pub vm: VmId,
    files: Files,
    /// It is to be kept at all.
    keeps: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    hold: Hold,
    wish: Wish,
    /// The agent is being ended.
    leaving: bool,
    /// Why it is not kept although it should be, or what the witness says.
    said: Option<String>,
}

/// What a task is given.
pub struct Given {
    pub witness: Arc<dyn Witness>,
    /// This agent's name.
    pub me: String,
    pub ttl: Duration,
    pub neighbour: Arc<Neighbour>,
    pub routes: Routes,
    pub generation: Box<dyn Fn() -> Option<Generation> + Send + Sync>,
}

impl Keeping {
    pub fn open(vm: VmId, files: Files, keeps: bool) -> Self {
        let hold = Hold::found(files.is_bound(vm), files.until(vm));
        Self { vm, files, keeps, state: Mutex::new(State { hold, ..State::default() }) }
    }

    pub fn kept(&self) -> Kept {
        self.state().hold.kept(boot::uptime_ms())
    }

    pub fn wish(&self, wish: Wish) {
        let mut state = self.state();
        let free = wish == Wish::Keep && (!self.keeps || state.leaving);
        state.wish = if free { Wish::Free } else { wish };
    }

    /// Whether it is kept where nothing stands against that.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    pub fn said(&self) -> Option<String> {
        self.state().said.clone()
    }

    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The site has promised, in answer to what was said at `sent`.
    fn promised(&self, sent: u64, for_ms: u64) {
        let until = {
            let mut state = self.state();
            state.hold.promised(sent, for_ms, boot::uptime_ms());
            state.hold.bound.then(|| state.hold.until())
        };
        if let Some(until) = until {
            self.allow(until);
        }
    }

    /// Keeps it until told to stop, and frees it then.
    pub async fn run(self: Arc<Self>, given: Given, mut stop: watch::Receiver<bool>) {
        let at_witness = async {
            let mut ours = None;
            loop {
                let looked = self.look(&given, &mut ours).await;
                self.tell(looked.unwrap_or_else(|error| Some(error.to_string())));
                tokio::time::sleep(LOOK).await;
            }
        };
        // Neither waits for the other.
        let at_site = async {
            loop {
                if let SiteWord::Open(generation) = given.neighbour.state().site {
                    given.routes.say_alive(self.vm, generation, boot::uptime_ms());
                }
                tokio::time::sleep(LOOK).await;
                if let Some((sent, for_ms)) = given.routes.promise(self.vm) {
                    self.promised(sent, for_ms.into());
                }
            }
        };
        tokio::select! {
            () = at_witness => {}
            () = at_site => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        // An agent that is ended in order lets its guests run on: nobody is to fail them over for that.
        self.state().leaving = true;
        self.wish(Wish::Free);
        let mut ours = None;
        let freed = tokio::time::timeout(FAREWELL, self.look(&given, &mut ours)).await;
        if self.kept() != Kept::Unbound {
            let why = freed.map_or_else(
                |_| Some("it took too long".into()),
                |freed| freed.unwrap_or_else(|error| Some(error.to_string())),
            );
            tracing::error!(vm = %self.vm, ?why, "still bound to the witness: the guard will pause this guest soon, unless an agent is started");
        }
    }

    /// Of a VM that is not protected here any more: until the witness says so too.
    pub async fn free(self: Arc<Self>, given: Given, mut stop: watch::Receiver<bool>) {
        let freed = async {
            let mut ours = None;
            while self.kept() != Kept::Unbound {
                let looked = self.look(&given, &mut ours).await;
                self.tell(looked.unwrap_or_else(|error| Some(error.to_string())));
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = freed => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    /// Returns what there is to say.
    async fn look(
        &self,
        given: &Given,
        ours: &mut Option<(LeaseId, Revision)>,
    ) -> Result<Option<String>, WitnessError> {
        let (wish, bound) = {
            let state = self.state();
            (state.wish, state.hold.bound)
        };
        if wish != Wish::Keep && !bound {
            return Ok(None);
        }
        if wish == Wish::Unbind {
            self.unbind();
        }
        let sent = boot::uptime_ms();
        let guarded = self.files.is_guarded(sent);
        // Without a guard nothing is prolonged.
        if let Some((lease, _)) = *ours
            && guarded
            && wish == Wish::Keep
            && !given.witness.renew(lease).await?
        {
            *ours = None;
        }
        let entries = given.witness.look(&[self.vm]).await?;
        let Some(entry) = entries.first() else { return Ok(None) };
        let open = match given.neighbour.state().site {
            SiteWord::Open(generation) => Some(generation),
            _ => None,
        };
        let generation = (given.generation)();
        let me = given.me.as_str();
        let known = Known { me, wish, guarded, bound, open, generation, entry, ours: *ours };
        let unguarded = || (wish == Wish::Keep && !guarded).then(|| UNGUARDED.to_owned());
        match act(&known) {
            Act::Renewed => {
                self.renewed(sent, given.ttl);
                Ok(None)
            }
            Act::Take(generation) => self.take(given, ours, entry.revision, generation).await,
            Act::Free(generation) => {
                let word = Word::Free { agent: given.me.clone(), generation };
                let change = Change { vm: self.vm, over: entry.revision, word, leasing: Leasing::Drop };
                if given.witness.change(&[change]).await?.is_some() {
                    *ours = None;
                    self.unbind();
                }
                Ok(unguarded())
            }
            Act::Unbind => {
                self.unbind();
                Ok(unguarded())
            }
            Act::Nothing => Ok(match &entry.word {
                Some(Word::Claimed { site, generation, .. }) => {
                    Some(format!("the witness says that site {site} has taken it (generation {generation})"))
                }
                _ => Some("it is taken at the witness once the site says that it is this host's".into()),
            }),
        }
    }

    async fn take(
        &self,
        given: &Given,
        ours: &mut Option<(LeaseId, Revision)>,
        over: Revision,
        generation: Generation,
    ) -> Result<Option<String>, WitnessError> {
        let (vm, sent) = (self.vm, boot::uptime_ms());
        let lease = given.witness.grant(given.ttl).await?;
        let before = self.state().hold.bound;
        // First, and whatever comes of it: from the next step on the witness may say that we keep it.
        if !self.bind(sent, given.ttl) {
            return Ok(Some("that it is bound to the witness could not be noted".into()));
        }
        fault::point("witness.bound");
        let word = Word::Kept { agent: given.me.clone(), generation };
        let change = Change { vm, over, word, leasing: Leasing::Bind(lease) };
        let taken = given.witness.change(&[change]).await;
        let refused = match &taken {
            Ok(taken) => taken.is_none(),
            Err(error) => error.is_refusal(),
        };
        if refused && !before {
            self.unbind();
        }
        let Some(revision) = taken? else {
            return Ok(Some("somebody else was quicker at the witness".into()));
        };
        *ours = Some((lease, revision));
        self.renewed(sent, given.ttl);
        tracing::info!(%vm, %generation, "kept at the witness");
        fault::point("witness.taken");
        Ok(None)
    }

    /// `false` if it could not be written down.
    fn bind(&self, sent: u64, ttl: Duration) -> bool {
        let vm = self.vm;
        let until = {
            let mut state = self.state();
            state.hold.bind(sent, millis(ttl));
            state.hold.until()
        };
        self.allow(until);
        match self.files.bind(vm) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%vm, %error, "that this VM is bound to the witness could not be noted");
                self.state().hold.bound = self.files.is_bound(vm);
                false
            }
        }
    }

    fn renewed(&self, sent: u64, ttl: Duration) {
        let until = {
            let mut state = self.state();
            state.hold.renewed(sent, millis(ttl));
            state.hold.until()
        };
        self.allow(until);
    }

    fn allow(&self, until: Until) {
        if let Err(error) = self.files.allow(self.vm, until) {
            tracing::warn!(vm = %self.vm, %error, "until when this VM may run could not be told to the guard");
        }
    }

    fn unbind(&self) {
        let vm = self.vm;
        match self.files.unbind(vm) {
            Ok(()) => {
                let mut state = self.state();
                if std::mem::take(&mut state.hold).bound {
                    tracing::info!(%vm, "not bound to the witness any more: nobody fails it over by himself");
                }
            }
            Err(error) => {
                tracing::warn!(%vm, %error, "that this VM is not bound any more could not be noted")
            }
        }
    }

    fn tell(&self, said: Option<String>) {
        let mut state = self.state();
        if state.said != said {
            match &said {
                Some(why) => tracing::warn!(vm = %self.vm, %why, "witness"),
                None => tracing::info!(vm = %self.vm, "witness: as it should be"),
            }
            state.said = said;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

const LOOK: Duration = Duration::from_secs(1);
/// Of the time that the daemon has for its end.
const FAREWELL: Duration = Duration::from_secs(4);
const UNGUARDED: &str =
    "not kept: the guard does not look after this host (systemctl enable --now lifeboat-guard)";
