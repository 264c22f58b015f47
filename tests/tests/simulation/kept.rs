//! A VM under a witness: the source's host with its agent and its guard, the site, the witness, a line between each two,
//! and clocks that do not agree. Real: what the agent says to the witness, what it does to the guest, and when the site
//! claims the VM. Stand-ins: the witness (held against etcd in tests/tests/witness.rs), guest, guard and messages, which
//! get lost on the way there or back. An agent may be frozen, or die, between any two of its messages, and goes on where
//! it was; what it decides about the guest it does at once. Agent and guard are not out at the same time.

mod site;

use crate::model_witness::ModelWitness;
use lifeboat::{
    id::VmId,
    units::{Generation, UnixMs},
    wire::message::PROMISE_MS,
    witness::{Change, Entry, LeaseId, Leasing, Revision, Word},
};
use lifeboat_agent::{
    fence::{
        book::{Fenced, Record},
        decide::{Facts, Guest, Lease, Policy, Step, Verdict, decide, verdict},
    },
    protect::neighbour::SiteWord,
    witness::hold::{Act, Hold, Kept, Known, Until, Wish, act},
};
use lifeboat_site_controller::automatic::decide::Part;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::time::Duration;

const VM: VmId = VmId::from_bytes([6; 16]);
const ME: &str = "a";
const TTL_MS: u64 = 9_000;
/// True milliseconds of a step.
const STEP: u64 = 100;
/// A second of the agent's and of the site's, in steps.
const SECOND: u64 = 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Process {
    Lives,
    Frozen,
    Dead,
}

/// Where the agent is in one look at the witness. `sent` was read before the look began.
#[derive(Clone)]
enum At {
    Idle,
    Renewing { sent: u64 },
    Looking { sent: u64 },
    Granting { sent: u64, over: Revision, generation: Generation },
    Taking { sent: u64, lease: LeaseId, over: Revision, generation: Generation },
    Freeing { over: Revision, generation: Generation },
}

struct Agent {
    hold: Hold,
    at: At,
    ours: Option<(LeaseId, Revision)>,
    wish: Wish,
    site: SiteWord,
    /// When the line was seen to be down, as an agent sees it: late.
    heard: u64,
}

/// A claim of the site's that outlives its controller.
#[derive(Clone)]
struct Claim {
    name: String,
    part: Part,
    taken: bool,
}

pub struct World {
    rng: StdRng,
    steps: u64,
    witness: ModelWitness,
    /// Per mille of true time: the host's clock, the witness's, the site's.
    rates: [u64; 3],
    /// Lines: agent and site, agent and witness, site and witness.
    lines: [bool; 3],
    // The host.
    agent: Option<Agent>,
    agent_is: Process,
    guard: Process,
    guard_looked: u64,
    guest: Guest,
    bound: bool,
    until: Until,
    paused_by_guard: bool,
    record: Record,
    known: Generation,
    // The site.
    generation: Generation,
    site_began: u64,
    site_heard: u64,
    claim: Option<Claim>,
    claims: u64,
    replica: bool,
    pub failovers: u64,
    pub pauses: u64,
    /// How it was when the guest stood although the agent had long reached the site, or the witness.
    pub harm: Option<String>,
    /// For how long the agent has reached the site, and the witness.
    calm: [u64; 2],
    /// For how long the guest has not run.
    stood: u64,
    log: Vec<String>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // Two clocks differ by 4 % at the most: far more than real ones, and less than a lease allows for.
        let rates = std::array::from_fn(|_| rng.random_range(980..=1020));
        let mut world = Self {
            rng,
            steps: 0,
            witness: ModelWitness::default(),
            rates,
            lines: [true; 3],
            agent: None,
            agent_is: Process::Dead,
            guard: Process::Lives,
            guard_looked: 0,
            guest: Guest::Runs,
            bound: false,
            until: Until::default(),
            paused_by_guard: false,
            record: Record::default(),
            known: Generation(1),
            generation: Generation(1),
            site_began: 0,
            site_heard: 0,
            claim: None,
            claims: 0,
            replica: false,
            failovers: 0,
            pauses: 0,
            harm: None,
            calm: [0; 2],
            stood: 0,
            log: Vec::new(),
        };
        world.start_agent();
        world.pass(100);
        world
    }

    fn clock(&self, whose: usize) -> u64 {
        self.steps * STEP * self.rates[whose] / 1000
    }

    pub fn event(&mut self) {
        let event = self.rng.random_range(0..100);
        self.log.push(format!("{}: {event}", self.steps));
        match event {
            0..15 => self.lines[0] = false,
            15..27 => self.lines[1] = false,
            27..31 => self.lines[2] = false,
            31..37 => (self.lines[0], self.lines[1]) = (false, false),
            37..47 => self.lines[self.steps as usize % 3] = true,
            47..53 => self.lines = [true; 3],
            53..60 if self.guard == Process::Lives && self.agent_is == Process::Lives => {
                self.agent_is = Process::Frozen;
            }
            60..66 if self.guard == Process::Lives => {
                (self.agent_is, self.agent) = (Process::Dead, None);
            }
            66..80 => self.revive_agent(),
            80..84 if self.agent_is == Process::Lives => {
                self.guard = if event % 2 == 0 { Process::Frozen } else { Process::Dead };
            }
            84..92 => self.guard = Process::Lives,
            // The controller is killed, and started again: who was heard when is forgotten, a claim is not.
            92..95 => self.site_began = self.clock(2),
            95..98 => self.go_home(),
            _ => {}
        }
        let steps = self.rng.random_range(1..120);
        self.pass(steps);
    }

    fn revive_agent(&mut self) {
        match self.agent_is {
            Process::Frozen => self.agent_is = Process::Lives,
            Process::Dead => self.start_agent(),
            Process::Lives => {}
        }
    }

    fn start_agent(&mut self) {
        self.agent_is = Process::Lives;
        let hold = Hold::found(self.bound, Some(self.until));
        let site = SiteWord::Silent;
        let wish = Wish::Free;
        self.agent = Some(Agent { hold, at: At::Idle, ours: None, wish, site, heard: 0 });
    }

    pub fn pass(&mut self, steps: u64) {
        for _ in 0..steps {
            self.steps += 1;
            self.witness.pass(STEP * self.rates[1] / 1000);
            if self.agent_is == Process::Lives {
                self.agent_steps();
            }
            if self.guard == Process::Lives {
                self.guard_looks();
            }
            if self.steps % SECOND == 7 {
                self.site_looks();
            }
            self.check();
        }
    }

    fn check(&mut self) {
        assert!(!(self.replica && self.guest == Guest::Runs), "both run: {:?}", self.log);
        let kept = self.agent_is == Process::Lives && self.claim.is_none() && !self.replica;
        let reached = [self.lines[0], self.lines[1] && self.guard == Process::Lives];
        for (calm, reached) in self.calm.iter_mut().zip(reached) {
            *calm = if kept && reached { *calm + 1 } else { 0 };
        }
        let calm = self.calm.iter().any(|calm| *calm > 30 * SECOND);
        self.stood = if self.guest == Guest::Runs { 0 } else { self.stood + 1 };
        // A few messages that are lost in a row stop it too, and the next one has it go on.
        if calm && self.stood > 15 * SECOND && self.harm.is_none() {
            let agent = self.agent.as_ref().map(|agent| (agent.site, agent.wish, agent.ours));
            let (calm, entry) = (self.calm, self.witness.look_now(VM));
            self.harm = Some(format!("step {}: {calm:?} {agent:?} {entry:?}", self.steps));
        }
    }

    /// A message gets there, if anything does.
    fn arrives(&mut self, line: usize) -> bool {
        self.lines[line] && self.rng.random_bool(0.97)
    }

    fn agent_steps(&mut self) {
        let now = self.clock(0);
        let Some(mut agent) = self.agent.take() else { return };
        if self.steps % SECOND == 3 {
            self.link(&mut agent, now);
            self.keep(&mut agent, now);
        }
        self.witness_step(&mut agent, now);
        self.agent = Some(agent);
    }

    /// What the site says, and what it promises. A line that is down is noticed late.
    fn link(&mut self, agent: &mut Agent, now: u64) {
        if !self.arrives(0) {
            if now.saturating_sub(agent.heard) > 10_000 {
                agent.site = SiteWord::Silent;
            }
            return;
        }
        let closed = self.claim.is_some();
        agent.site = match (closed, self.known < self.generation) {
            (_, true) => SiteWord::Fenced(self.generation),
            (true, false) => SiteWord::Refused,
            (false, false) => SiteWord::Open(self.generation),
        };
        // It was heard; whether the answer comes is another matter.
        let open = matches!(agent.site, SiteWord::Open(_));
        if open {
            self.site_heard = self.clock(2);
        }
        if self.arrives(0) {
            agent.heard = now;
            if open {
                agent.hold.promised(now, PROMISE_MS.into(), now);
                self.allow(&agent.hold);
            }
        }
    }

    fn allow(&mut self, hold: &Hold) {
        if hold.bound {
            self.until = hold.until();
        }
    }

    /// The keeper's look.
    fn keep(&mut self, agent: &mut Agent, now: u64) {
        if std::mem::take(&mut self.paused_by_guard) && self.record.isolated.is_none() {
            self.record.isolated = Some(UnixMs(now));
        }
        agent.wish = match verdict(agent.site, &self.record, None) {
            Verdict::Fenced(_) | Verdict::Allowed => Wish::Unbind,
            _ if self.guest == Guest::Off => Wish::Free,
            _ => Wish::Keep,
        };
        let record = self.record.clone();
        let facts = Facts {
            site: agent.site,
            silent_for: Duration::from_millis(now.saturating_sub(agent.heard)),
            guest: self.guest,
            label: None,
            record: &record,
            lease: Lease::Fresh,
            start_refused: false,
            autostart: false,
            may_save: false,
            saved_unnoted: false,
            held: false,
            kept: agent.hold.kept(now),
        };
        for step in decide(&facts, Policy { pause_fenced: true, isolation: None }) {
            match step {
                Step::Pause => {
                    self.pauses += 1;
                    self.guest = Guest::Stands;
                }
                Step::Resume => {
                    assert!(self.record.fenced.is_none(), "a fenced copy was resumed: {:?}", self.log);
                    self.guest = Guest::Runs;
                }
                Step::NoteFenced(current) => {
                    self.record.fenced = Some(Fenced { current, at: UnixMs(now), saved: None });
                }
                Step::ForgetFenced => self.record.fenced = None,
                Step::NoteIsolated => self.record.isolated = Some(UnixMs(now)),
                Step::ForgetIsolated => self.record.isolated = None,
                _ => {}
            }
        }
    }

    /// One message to the witness, and what follows from its answer.
    fn witness_step(&mut self, agent: &mut Agent, now: u64) {
        let guarded = self.guard_looked + 2_000 > now;
        match agent.at.clone() {
            At::Idle
                if self.steps.is_multiple_of(SECOND) && (agent.wish == Wish::Keep || agent.hold.bound) =>
            {
                if agent.wish == Wish::Unbind {
                    self.unbind(agent);
                }
                agent.at = match agent.ours {
                    Some(_) if guarded && agent.wish == Wish::Keep => At::Renewing { sent: now },
                    _ => At::Looking { sent: now },
                };
            }
            At::Idle => {}
            At::Renewing { sent } => {
                let lease = agent.ours.map(|(lease, _)| lease);
                let renewed = self.asks(|witness| lease.is_some_and(|lease| witness.renew_now(lease)));
                agent.at = if renewed.is_some() { At::Looking { sent } } else { At::Idle };
                if renewed == Some(false) {
                    agent.ours = None;
                }
            }
            At::Looking { sent } => {
                agent.at = At::Idle;
                let Some(entry) = self.asks(|witness| witness.look_now(VM)) else { return };
                self.heeds(agent, sent, guarded, &entry);
            }
            At::Granting { sent, over, generation } => {
                agent.at = At::Idle;
                let granted = self.asks(|witness| witness.grant_now(Duration::from_millis(TTL_MS)));
                if let Some(lease) = granted {
                    agent.hold.bind(sent, TTL_MS);
                    self.bound = true;
                    self.allow(&agent.hold);
                    agent.at = At::Taking { sent, lease, over, generation };
                }
            }
            At::Taking { sent, lease, over, generation } => {
                agent.at = At::Idle;
                let word = Word::Kept { agent: ME.into(), generation };
                let change = Change { vm: VM, over, word, leasing: Leasing::Bind(lease) };
                if let Some(Ok(Some(revision))) = self.asks(|witness| witness.change_now(&[change])) {
                    agent.ours = Some((lease, revision));
                    agent.hold.renewed(sent, TTL_MS);
                    self.allow(&agent.hold);
                }
            }
            At::Freeing { over, generation } => {
                agent.at = At::Idle;
                let word = Word::Free { agent: ME.into(), generation };
                let change = Change { vm: VM, over, word, leasing: Leasing::Drop };
                if let Some(Ok(Some(_))) = self.asks(|witness| witness.change_now(&[change])) {
                    agent.ours = None;
                    self.unbind(agent);
                }
            }
        }
    }

    fn heeds(&mut self, agent: &mut Agent, sent: u64, guarded: bool, entry: &Entry) {
        let open = if let SiteWord::Open(generation) = agent.site { Some(generation) } else { None };
        let known = Known {
            me: ME,
            wish: agent.wish,
            guarded,
            bound: agent.hold.bound,
            open,
            generation: Some(self.known),
            entry,
            ours: agent.ours,
        };
        match act(&known) {
            Act::Nothing => {}
            Act::Renewed => {
                agent.hold.renewed(sent, TTL_MS);
                self.allow(&agent.hold);
            }
            Act::Take(generation) => {
                agent.at = At::Granting { sent: self.clock(0), over: entry.revision, generation };
            }
            Act::Free(generation) => agent.at = At::Freeing { over: entry.revision, generation },
            Act::Unbind => self.unbind(agent),
        }
    }

    fn unbind(&mut self, agent: &mut Agent) {
        self.bound = false;
        agent.hold = Hold::default();
    }

    /// `None`: no answer came, whether it was done or not.
    fn asks<T>(&mut self, ask: impl FnOnce(&ModelWitness) -> T) -> Option<T> {
        if !self.arrives(1) {
            return None;
        }
        let answer = ask(&self.witness);
        self.arrives(1).then_some(answer)
    }

    /// libvirt may hang: then it is the kernel that stops the guest, later.
    fn guard_looks(&mut self) {
        let now = self.clock(0);
        let hangs = self.rng.random_bool(0.3);
        let late = if hangs { self.until.hard } else { self.until.soft };
        if self.bound && now >= late && self.guest == Guest::Runs {
            self.paused_by_guard = true;
            self.pauses += 1;
            self.guest = Guest::Stands;
        }
        self.guard_looked = now;
    }

    /// The replica ends, and the VM goes on at the source, whose agent the site lets in under a newer generation.
    fn go_home(&mut self) {
        let told = self.record.fenced.is_some() && self.agent_is == Process::Lives && self.lines[0];
        if !self.replica || !told || self.bound {
            return;
        }
        self.replica = false;
        self.claim = None;
        self.generation = self.generation.next();
        self.known = self.generation;
        self.record = Record::default();
        self.guest = Guest::Runs;
        self.site_heard = self.clock(2);
        if let Some(agent) = &mut self.agent {
            agent.site = SiteWord::Open(self.generation);
        }
    }

    /// All is well again: exactly one copy runs, and where it is the source's it is kept.
    pub fn comes_to_rest(&mut self) {
        self.lines = [true; 3];
        self.guard = Process::Lives;
        self.revive_agent();
        self.pass(90 * SECOND);
        let runs = self.guest == Guest::Runs;
        assert!(
            self.replica != runs,
            "{} copies run: {:?}",
            u8::from(self.replica) + u8::from(runs),
            self.log
        );
        let kept = self.agent.as_ref().map(|agent| agent.hold.kept(self.clock(0)));
        assert!(self.replica || kept == Some(Kept::Held), "{:?}", self.log);
    }
}
