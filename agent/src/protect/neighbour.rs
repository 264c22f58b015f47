//! Stepping aside: who asked for it, who was found to need the guest's QEMU, and whether we are out of the way. Also what
//! the site last said of the VM, for `fence`, which may have the guest kept still.
//! Promises: an operator's wish outlives the agent's process but not the host's boot, and ends when its time is over,
//! counted by a clock that neither jumps nor stops while the host sleeps. Changed by the local API and by [`super::lookout`];
//! obeyed by [`super::vm`], which says through [`Neighbour::set_aside`] when nothing is held any more.

use lifeboat::{
    durable,
    id::VmId,
    units::{Generation, UnixMs},
    wire::message::VmState,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// What somebody asked for at the local API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Milliseconds since the host was started.
    pub until_uptime_ms: u64,
    /// The same, for people.
    pub until: UnixMs,
    pub by: String,
}

/// What the site last said of this VM, on the link that is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SiteWord {
    /// No link, or no answer on it yet.
    #[default]
    Silent,
    /// Whoever knows this generation may write.
    Open(Generation),
    /// It was failed over.
    Fenced(Generation),
    /// It was refused for another reason.
    Refused,
}

/// No points may be cut, as the guest is not to run: what is shown meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub state: VmState,
    pub why: String,
}

/// All that is known for one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub site: SiteWord,
    pub held: Option<Held>,
    pub asked: Option<Asked>,
    /// What somebody else is doing with the guest.
    pub busy: Option<String>,
    /// Protection was ended by an order: nothing of ours stays, and nothing begins again.
    pub leave: bool,
    /// What is known of the site's copy is not to be trusted: the next point is compared with it.
    pub afresh: bool,
    /// The guest was last seen to leave for another host.
    pub away: bool,
    /// How often it left.
    pub departures: u64,
    /// The protection holds nothing of QEMU's.
    pub aside: bool,
}

impl State {
    /// Why protection must keep aside now, if it must.
    pub fn why(&self) -> Option<String> {
        if self.leave {
            return Some(ENDED.into());
        }
        if let Some(held) = &self.held {
            return Some(held.why.clone());
        }
        if let Some(asked) = &self.asked {
            return Some(format!("yielding until {}, asked by {}", asked.until, asked.by));
        }
        self.busy.as_ref().map(|busy| format!("yielding to {busy}"))
    }

    /// How a VM is called that is kept aside from.
    pub fn aside_state(&self) -> VmState {
        let held = self.held.as_ref().filter(|_| !self.leave);
        held.map_or(VmState::Yielding, |held| held.state)
    }
}

/// One VM's.
#[derive(Debug)]
pub struct Neighbour {
    vm: VmId,
    book: Option<Book>,
    state: watch::Sender<State>,
}

impl Neighbour {
    /// Takes up what an agent before us was asked for; `book` may be missing where nothing need be remembered.
    pub fn open(vm: VmId, book: Option<Book>) -> Self {
        let asked = book.as_ref().and_then(|book| book.load(vm));
        let (state, _) = watch::channel(State { asked, ..State::default() });
        Self { vm, book, state }
    }

    pub fn vm(&self) -> VmId {
        self.vm
    }

    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub fn why(&self) -> Option<String> {
        self.state.borrow().why()
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Somebody asks us to keep aside, or with `None` to go on. Returns once that is remembered.
    pub fn ask(&self, asked: Option<Asked>) -> io::Result<()> {
        if let Some(book) = &self.book {
            book.save(self.vm, asked.as_ref())?;
        }
        self.change(|state| state.asked = asked);
        Ok(())
    }

    /// Ends an asked-for time that is over.
    pub fn expire(&self, uptime: Duration) {
        let over = |asked: &Asked| u128::from(asked.until_uptime_ms) <= uptime.as_millis();
        if self.state.borrow().asked.as_ref().is_some_and(over)
            && let Err(error) = self.ask(None)
        {
            tracing::warn!(vm = %self.vm, %error, "a time to keep aside is over, and its record could not be removed");
            self.change(|state| state.asked = None);
        }
    }

    /// Said by the protection: what the site says.
    pub fn heard(&self, site: SiteWord) {
        self.change(|state| state.site = site);
    }

    /// Said by `fence`.
    pub fn hold(&self, held: Option<Held>) {
        self.change(|state| state.held = held);
    }

    pub fn set_busy(&self, busy: Option<String>) {
        self.change(|state| state.busy = busy);
    }

    pub fn set_away(&self, away: bool) {
        self.change(|state| {
            state.departures += u64::from(away);
            state.away = away;
        });
    }

    /// Ends the protection for as long as this process lives.
    pub fn leave(&self) {
        self.change(|state| state.leave = true);
    }

    /// Has the next point compared with the site's copy from end to end.
    pub fn ask_afresh(&self) {
        self.change(|state| state.afresh = true);
    }

    /// Said by the protection: it has forgotten what it knew.
    pub fn set_forgotten(&self) {
        self.change(|state| state.afresh = false);
    }

    /// Said by the protection: nothing of QEMU's is held, or something may be again.
    pub fn set_aside(&self, aside: bool) {
        self.change(|state| state.aside = aside);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_if_modified(|state| {
            let before = state.clone();
            change(state);
            *state != before
        });
    }
}

/// All VMs of an agent, by the names that it knows them by.
#[derive(Clone, Debug, Default)]
pub struct Neighbours(Arc<Mutex<BTreeMap<String, Arc<Neighbour>>>>);

impl Neighbours {
    pub fn insert(&self, name: &str, neighbour: Arc<Neighbour>) {
        self.rows().insert(name.to_owned(), neighbour);
    }

    /// Nobody protects it any more.
    pub fn remove(&self, vm: VmId) {
        self.rows().retain(|_, row| row.vm != vm);
    }

    /// By name or UUID.
    pub fn find(&self, name: &str) -> Option<Arc<Neighbour>> {
        let rows = self.rows();
        let by_id = || rows.values().find(|row| row.vm.to_string() == name);
        rows.get(name).or_else(by_id).cloned()
    }

    pub fn names(&self) -> Vec<String> {
        self.rows().keys().cloned().collect()
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Neighbour>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where wishes are remembered: a folder that a reboot empties, one file per VM.
#[derive(Clone, Debug)]
pub struct Book {
    dir: PathBuf,
}

impl Book {
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    /// A file that can't be read asks for nothing.
    fn load(&self, vm: VmId) -> Option<Asked> {
        let text = fs::read(self.path(vm)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn save(&self, vm: VmId, asked: Option<&Asked>) -> io::Result<()> {
        match asked {
            Some(asked) => durable::replace(&self.path(vm), &serde_json::to_vec(asked)?, 0o600),
            None => match fs::remove_file(self.path(vm)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.dir.join(format!("{vm}.yield"))
    }
}

const ENDED: &str = "protection was ended by `lifeboat-agent unprotect`; remove the VM from agent.toml, or restart the agent to go on";

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId::from_bytes([5; 16]);

    fn asked(until_uptime_ms: u64) -> Asked {
        Asked { until_uptime_ms, until: UnixMs(1_700_000_000_000), by: "root".into() }
    }

    #[test]
    fn a_wish_outlives_the_agent_and_ends_when_its_time_is_over_whatever_the_wall_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let book = Book::open(dir.path().join("yields")).unwrap();
        Neighbour::open(VM, Some(book.clone())).ask(Some(asked(10_000))).unwrap();
        let next = Neighbour::open(VM, Some(book.clone()));
        next.expire(Duration::from_millis(9_999));
        assert!(next.why().unwrap().contains("asked by root"), "{:?}", next.why());
        // The host slept for an hour: that time counts.
        next.expire(Duration::from_secs(3_610));
        assert_eq!(next.why(), None);
        assert_eq!(Neighbour::open(VM, Some(book)).why(), None);
    }

    #[test]
    fn the_strongest_reason_is_the_one_that_is_told() {
        let neighbour = Neighbour::open(VM, None);
        let mut seen = neighbour.watch();
        neighbour.set_busy(Some("a save".into()));
        assert_eq!(neighbour.why().unwrap(), "yielding to a save");
        neighbour.ask(Some(asked(1))).unwrap();
        assert!(neighbour.why().unwrap().starts_with("yielding until"));
        neighbour.leave();
        assert!(neighbour.why().unwrap().contains("unprotect"));
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        neighbour.leave();
        assert!(!seen.has_changed().unwrap(), "nothing new was said");
    }

    #[test]
    fn a_vm_is_found_by_name_and_by_uuid() {
        let all = Neighbours::default();
        all.insert("web", Arc::new(Neighbour::open(VM, None)));
        assert!(all.find("web").is_some() && all.find(&VM.to_string()).is_some() && all.find("db").is_none());
    }
}
