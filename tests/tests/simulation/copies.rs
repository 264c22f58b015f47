//! Two copies of one VM, and who believes that it is theirs: a host that loses power, its line, its agent and its
//! libvirt at any moment, a site that fails the VM over at any moment, and a way home by which it comes back. Real: what
//! the agent decides, both halves of the conversation, the record. Stand-ins: the guest, libvirt and its hook, whose
//! script is held to the same table by a test of its own (`agent/src/fence/hook/tests.rs`).

use lifeboat::{
    id::VmId,
    session::{
        receiver::{Held, Receiver},
        sender::{Sender, Standing},
    },
    units::{Generation, UnixMs},
    wire::message::{Refusal, SiteMessage},
};
use lifeboat_agent::{
    fence::{
        book::{Allowed, Fenced, Record},
        decide::{Facts, Guest, Lease, Policy, Step, Verdict, decide, verdict},
    },
    protect::neighbour::SiteWord,
    witness::hold::Kept,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{path::PathBuf, time::Duration};

const VM: VmId = VmId::from_bytes([4; 16]);
const ISOLATION_S: u64 = 10;
const STEPS_MAX: u32 = 40;

/// The file that the hook reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseFile {
    None,
    Granted,
    Until(u64),
    Fenced(Generation),
}

struct Agent {
    sender: Sender,
    silent_since: u64,
    /// The line is known to be up, and the site was asked on it.
    connected: bool,
}

pub struct World {
    rng: StdRng,
    now: u64,
    policy: Policy,
    hook: bool,
    // The site.
    generation: Generation,
    replica_runs: bool,
    /// It came home, and was not failed over since; and whether it is protected to the site again.
    home: bool,
    handed: bool,
    line: bool,
    // The host: what a power cut leaves, and what it takes.
    record: Record,
    known: Option<Generation>,
    saved: bool,
    power: bool,
    lease: LeaseFile,
    refused: bool,
    guest: Guest,
    /// Of the failover home that made the copy that is defined here.
    label: Option<Generation>,
    saved_file: bool,
    agent: Option<Agent>,
    /// Its operator suspended it, and did not resume it.
    suspended: bool,
    /// It was noted on this host that the VM was failed over, and no operator has said otherwise since.
    told: bool,
    pub returns: u64,
    pub fenced: u64,
    pub homes: u64,
    log: Vec<String>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let isolation = rng.random_bool(0.5).then_some(Duration::from_secs(ISOLATION_S));
        let policy = Policy { pause_fenced: rng.random_bool(0.9), isolation };
        let hook = rng.random_bool(0.8);
        let mut world = Self {
            rng,
            now: 0,
            policy,
            hook,
            generation: Generation(1),
            replica_runs: false,
            home: false,
            handed: false,
            line: true,
            record: Record::default(),
            known: None,
            saved: false,
            power: true,
            lease: LeaseFile::None,
            refused: false,
            guest: Guest::Runs,
            label: None,
            saved_file: false,
            agent: None,
            suspended: false,
            told: false,
            returns: 0,
            fenced: 0,
            homes: 0,
            log: Vec::new(),
        };
        world.start_agent();
        world.connect();
        world.settle();
        world
    }

    pub fn event(&mut self) {
        let event = self.rng.random_range(0..103);
        self.log.push(format!("{}: {event}", self.now));
        match event {
            0..20 => self.pass(),
            20..34 => self.look(true),
            34..44 => self.line = false,
            44..58 => self.heal(),
            58..66 => self.agent = None,
            66..74 => self.start_agent(),
            74..79 => self.power_cut(),
            79..86 => self.power_on(),
            86..89 => drop(self.start_guest()),
            89..91 if self.guest == Guest::Stands && !self.is_fenced_here() => {
                (self.guest, self.suspended) = (Guest::Runs, false);
            }
            // Behind the agent's back.
            91..92 if self.guest == Guest::Stands => self.guest = Guest::Runs,
            92..94 if self.guest == Guest::Runs => {
                (self.guest, self.suspended) = (Guest::Stands, self.record.isolated.is_none());
            }
            94..96 if self.guest != Guest::Off => self.guest = Guest::Off,
            96..98 => self.fail_over(),
            98..102 if self.replica_runs => self.go_home(),
            98..102 => self.reprotect(),
            _ => self.connect(),
        }
        self.check();
    }

    fn is_fenced_here(&self) -> bool {
        self.record.fenced.is_some()
    }

    fn pass(&mut self) {
        for _ in 0..self.rng.random_range(1..8) {
            self.tick();
        }
    }

    /// A second, in which a living agent looks once, and finds out about its line.
    fn tick(&mut self) {
        self.now += 1;
        if !self.line
            && let Some(agent) = self.agent.as_mut().filter(|agent| agent.connected)
        {
            agent.connected = false;
            agent.silent_since = self.now;
            agent.sender.link_down();
        }
        self.look(false);
    }

    fn heal(&mut self) {
        self.returns += u64::from(!self.line);
        self.line = true;
        self.connect();
    }

    /// The agent dials, asks, and is answered.
    fn connect(&mut self) {
        let held = Held {
            generation: self.generation,
            latest: None,
            raised_since_latest: self.generation > Generation(1),
        };
        let Some(agent) = self.agent.as_mut().filter(|_| self.line) else { return };
        agent.connected = true;
        drop(agent.sender.link_up(1 << 20));
        if self.handed && agent.sender.generation().is_none_or(|theirs| theirs < self.generation) {
            drop(agent.sender.on_message(SiteMessage::Adopt { vm: VM, generation: self.generation }));
        }
        let answer = Receiver::new(VM).watch(held, agent.sender.generation());
        drop(agent.sender.on_message(answer));
        if let Standing::Open { generation, .. } = agent.sender.standing() {
            self.known = Some(*generation);
        }
        assert!(
            !(self.replica_runs && matches!(agent.sender.standing(), Standing::Open { .. })),
            "the site said of a VM that was failed over that it is this agent's"
        );
    }

    fn start_agent(&mut self) {
        if !self.power || self.agent.is_some() {
            return;
        }
        let sender = Sender::new(VM, "web".into(), self.known);
        self.agent = Some(Agent { sender, silent_since: self.now, connected: false });
        // Before anything else.
        if matches!(verdict(SiteWord::Silent, &self.record, self.label), Verdict::Fenced(_))
            && self.policy.pause_fenced
            && self.guest == Guest::Runs
        {
            self.guest = Guest::Stands;
        }
    }

    fn power_cut(&mut self) {
        self.power = false;
        (self.agent, self.guest, self.suspended) = (None, Guest::Off, false);
        (self.lease, self.refused) = (LeaseFile::None, false);
    }

    /// libvirt starts what starts with the host.
    fn power_on(&mut self) {
        if !self.power {
            self.power = true;
            self.start_guest();
        }
    }

    fn hook_lets(&self) -> bool {
        match self.lease {
            _ if !self.hook => true,
            LeaseFile::Granted => true,
            LeaseFile::Until(until) => self.now < until,
            LeaseFile::Fenced(current) => self.label > Some(current),
            LeaseFile::None => false,
        }
    }

    /// Somebody asks libvirt to start it.
    fn start_guest(&mut self) -> bool {
        if !self.power || self.guest != Guest::Off {
            return true;
        }
        if !self.hook_lets() {
            self.refused = true;
            return false;
        }
        let given_before = self.lease == LeaseFile::Granted && self.policy.isolation.is_none();
        // A lease without an end outlives the agent, and so does that of a later failover to here.
        let bounded = matches!(self.lease, LeaseFile::Until(_) | LeaseFile::Fenced(_));
        assert!(
            !(self.hook && self.replica_runs) || given_before || bounded,
            "a copy was started beside its replica: {:?}",
            self.log
        );
        (self.guest, self.suspended) = (Guest::Runs, false);
        true
    }

    /// The source's agent is told, where there is a line.
    fn fail_over(&mut self) {
        // A site that the VM went home from, and that it is not protected to, has failed it over already.
        if self.replica_runs || (self.home && !self.handed) {
            return;
        }
        self.generation = self.generation.next();
        (self.replica_runs, self.home, self.handed) = (true, false, false);
        if let Some(agent) = self.agent.as_mut().filter(|agent| agent.connected && self.line) {
            let refusal = Refusal::Fenced { current: self.generation };
            let told = SiteMessage::VmRefused { vm: VM, refusal };
            drop(agent.sender.on_message(told));
        }
    }

    /// The replica stands, and the VM is started on this host, under a generation above all that were. Where that does not work
    /// the replica goes on.
    fn go_home(&mut self) {
        if !self.power || self.guest != Guest::Off {
            return;
        }
        let before = self.label.replace(self.generation.next().next());
        if !self.hook_lets() {
            (self.label, self.refused) = (before, true);
            return;
        }
        (self.replica_runs, self.home, self.told) = (false, true, false);
        (self.guest, self.suspended) = (Guest::Runs, false);
        (self.saved_file, self.saved) = (false, false);
        self.homes += 1;
    }

    /// The site lets the agent in again, whether it is there or not.
    fn reprotect(&mut self) {
        let Some(label) = self.label.filter(|_| self.home && !self.handed) else { return };
        (self.generation, self.handed) = (label.next(), true);
        self.connect();
    }

    fn word(agent: &Agent) -> SiteWord {
        match agent.sender.standing() {
            Standing::Unknown => SiteWord::Silent,
            Standing::Open { generation, .. } => SiteWord::Open(*generation),
            Standing::Refused(Refusal::Fenced { current }) => SiteWord::Fenced(*current),
            Standing::Refused(_) => SiteWord::Refused,
        }
    }

    fn lease(&self) -> Lease {
        let lasts = self.policy.isolation.map(|lasts| lasts.as_secs());
        match (self.lease, lasts) {
            (LeaseFile::None, _) => Lease::Missing,
            (LeaseFile::Fenced(_), _) => Lease::Fenced,
            (LeaseFile::Granted, None) => Lease::Fresh,
            (LeaseFile::Until(until), Some(lasts)) if until.saturating_sub(self.now) >= lasts / 2 => {
                Lease::Fresh
            }
            (LeaseFile::Granted | LeaseFile::Until(_), _) => Lease::Stale,
        }
    }

    /// One look of the agent's; with `may_die`, it may die before or after any step.
    fn look(&mut self, may_die: bool) {
        let Some(agent) = &self.agent else { return };
        let site = Self::word(agent);
        let silent = if site == SiteWord::Silent { self.now - agent.silent_since } else { 0 };
        let record = self.record.clone();
        let facts = Facts {
            site,
            silent_for: Duration::from_secs(silent),
            guest: self.guest,
            label: self.label,
            record: &record,
            lease: self.lease(),
            start_refused: self.refused,
            autostart: true,
            may_save: self.guest == Guest::Stands && self.rng.random_bool(0.7),
            saved_unnoted: self.saved_file
                && record.fenced.as_ref().is_some_and(|fenced| fenced.saved.is_none()),
            held: false,
            kept: Kept::Unbound,
        };
        // By what was said since it came here, and not by the verdict that is tried here.
        let said = matches!(site, SiteWord::Fenced(current) if Some(current) > self.label);
        let fenced = (self.told || said) && !self.home;
        let unsure = verdict(site, &record, self.label) == Verdict::Unsure && site == SiteWord::Silent;
        let isolated = unsure && self.policy.isolation.is_some_and(|after| silent >= after.as_secs());
        for step in decide(&facts, self.policy) {
            if may_die && self.rng.random_bool(0.15) {
                self.agent = None;
                return;
            }
            assert!(
                !fenced || !matches!(step, Step::Resume | Step::Start | Step::WriteLease),
                "{step:?} of a fenced copy: {:?}",
                self.log
            );
            self.perform(step);
        }
        let must_stand = (fenced && self.policy.pause_fenced) || isolated;
        assert!(!must_stand || self.guest != Guest::Runs, "it runs after a look: {:?}", self.log);
        assert!(!fenced || !self.hook || !self.hook_lets(), "a fenced copy may be started: {:?}", self.log);
    }

    fn perform(&mut self, step: Step) {
        let now = UnixMs(self.now);
        match step {
            Step::RefuseStarts(current) => self.lease = LeaseFile::Fenced(current),
            Step::NoteFenced(current) => {
                self.fenced += 1;
                self.told = true;
                self.record.fenced = Some(Fenced { current, at: now, saved: None });
            }
            Step::ForgetFenced => self.record.fenced = None,
            Step::NoteIsolated => self.record.isolated = Some(now),
            Step::ForgetIsolated => self.record.isolated = None,
            Step::ForgetAllowed => self.record.allowed = None,
            Step::Pause => self.guest = Guest::Stands,
            Step::Resume => self.guest = Guest::Runs,
            Step::Save => {
                assert!(self.is_fenced_here(), "a copy that is not fenced was put away");
                // It may die between the two.
                (self.guest, self.saved_file) = (Guest::Off, true);
            }
            Step::NoteSaved => {
                if let Some(fenced) = &mut self.record.fenced {
                    (fenced.saved, self.saved) = (Some(PathBuf::from("kept")), true);
                }
            }
            Step::WriteLease => {
                let until = self.policy.isolation.map(|lasts| self.now + lasts.as_secs());
                self.lease = until.map_or(LeaseFile::Granted, LeaseFile::Until);
            }
            Step::DropLease => self.lease = LeaseFile::None,
            Step::Start => assert!(self.start_guest(), "the hook refused the agent's own start"),
            Step::ForgetRefusal => self.refused = false,
        }
    }

    /// What must hold at every moment.
    fn check(&self) {
        let Some(agent) = &self.agent else { return };
        let believes = self.guest == Guest::Runs && matches!(Self::word(agent), SiteWord::Open(_));
        let could_know = agent.connected && self.line;
        assert!(
            !(believes && could_know && self.replica_runs),
            "two running copies that both believe that the VM is theirs: {:?}",
            self.log
        );
    }

    /// A few looks of an agent that nothing befalls.
    fn settle(&mut self) {
        for _ in 0..5 {
            self.tick();
        }
    }

    /// Everything works again: where nobody failed it over, the guest runs; where somebody did, it does not.
    pub fn comes_to_rest(&mut self) {
        self.power_on();
        self.start_agent();
        self.heal();
        self.settle();
        self.reprotect();
        self.settle();
        if self.replica_runs && self.policy.pause_fenced {
            assert!(self.guest != Guest::Runs, "it runs beside its replica: {:?}", self.log);
            self.tries(50);
            assert!(self.guest == Guest::Off || !self.saved || !self.hook, "{:?}", self.log);
        } else if !self.replica_runs {
            if self.guest == Guest::Off {
                assert!(self.start_guest(), "it can't be started: {:?}", self.log);
            }
            assert!(self.suspended || self.guest == Guest::Runs, "it stands for nobody: {:?}", self.log);
            assert!(self.record.isolated.is_none() && self.record.fenced.is_none() && self.hook_lets());
        }
    }

    fn tries(&mut self, times: u32) {
        for _ in 0..times {
            self.tick();
            if !self.start_guest() {
                self.settle();
            }
            self.check();
        }
    }

    /// The site is lost for good: an operator's word lets the copy run, over all that follows on this host.
    pub fn is_allowed_and_runs(&mut self) {
        self.power_on();
        self.line = false;
        self.agent = None;
        let up_to = self.record.fenced.take().map_or(Generation(0), |fenced| fenced.current);
        self.record.allowed = Some(Allowed { at: UnixMs(self.now), by: "root".into(), up_to });
        self.lease = LeaseFile::Granted;
        (self.replica_runs, self.told) = (false, false);
        self.start_agent();
        for _ in 0..30 {
            self.tick();
        }
        if self.guest == Guest::Off {
            assert!(self.start_guest());
        }
        self.guest = Guest::Runs;
        for _ in 0..30 {
            self.tick();
        }
        assert_eq!(self.guest, Guest::Runs, "{:?}", self.log);
    }
}

pub fn run(seed: u64, steps: u32) -> World {
    let mut world = World::new(seed);
    for _ in 0..steps.min(STEPS_MAX) {
        world.event();
    }
    world
}
