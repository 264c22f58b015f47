//! The engine that asks the kernel what was written: `/proc/PID/clear_refs` and the soft-dirty bits of
//! `/proc/PID/pagemap`. Nothing of QEMU's is held between cuts, and a pause reads only what may have changed.
//!
//! Promises: flags are cleared only while the guest is stopped, when QEMU has no I/O under way; before that, each is
//! noted as *owed* until a point that carries its page is durable. A page that is neither present nor swapped counts as
//! zero whatever its flag says, one that became the kernel's page of zeros is read. A flag is only a hint to read: what
//! is sent is decided by the digest of 4 KiB, so that a flagged huge page costs reading and not sending. Memory that
//! the kernel can't tell of (a file's, shared, huge pages by hugetlb) is read whole each time, and `probe` advises
//! against it. If somebody else cleared flags, the next look tells by *witnesses*, pages known to be flagged.
//! Called through [`MemoryEngine`].

mod fitness;
mod flags;
mod pages;
mod sheet;
mod stopped;
#[cfg(test)]
mod tests;

use super::{
    Fitness, Held, MemoryEngine, MemoryError, RamImage, Staging, Target,
    group::{Gather, ZERO},
    known::Known,
    layout::Place,
    lineage::Lineage,
    process_memory,
};
use fitness::Merging;
use flags::{Entry, KernelFlags, PageFlags};
use lifeboat::{
    hypervisor::{domain_xml::DomainSpec, libvirt::QemuProcess},
    id::PointId,
    page::{PAGE, PageGroup},
    qemu::stream::RamBlock,
};
use pages::PageSet;
use sheet::{Sheet, Watch};
use std::collections::{HashMap, VecDeque};

/// So few unread pages are left for the pause: 4 MiB.
const FEW: u64 = 1024;
/// Rounds of reading while the guest runs, between two clearings of the flags.
const ROUNDS_MAX: u32 = 8;
/// If more pages than this would have to be read in the pause (64 MiB), a short pause before it clears their flags.
const MANY: u64 = 16 << 10;
/// Such short pauses for one point at the most.
const EARLY_PAUSES_MAX: u32 = 4;
/// Pages read by one call of `before`.
const AT_ONCE: u64 = 1024;
/// Witnesses at the most, and as many as are looked for as soon as the guest runs again.
const WITNESSES: usize = 32;
const WITNESSES_AFTER: usize = 8;

/// See the module.
pub struct SoftDirty {
    held: Held,
    known: Option<Known>,
    staging: Staging,
    round: Option<Round>,
    tracked: Option<Tracked>,
    open: fn(QemuProcess) -> Result<Box<dyn PageFlags>, MemoryError>,
}

/// A process whose flags are watched.
struct Tracked {
    process: QemuProcess,
    flags: Box<dyn PageFlags>,
    /// They were cleared by this agent, so that they tell something.
    cleared: bool,
    /// What is owed since the basis.
    owed: Owed,
    /// What was owed before each point that was sent: should it be lost, it is owed again.
    sent: Lineage<Owed>,
    /// Addresses of pages that were seen flagged since.
    witnesses: Vec<u64>,
    /// Whether KSM may merge its pages, once that was found out.
    mergeable: Option<bool>,
}

/// Per block: how it was watched, and pages whose flags were cleared.
type Owed = HashMap<String, (Watch, PageSet)>;

/// One cut being made.
struct Round {
    sheets: Vec<Sheet>,
    ready: VecDeque<PageGroup>,
    step: Step,
    rounds: u32,
    early_pauses: u32,
    /// Pages that were left unread by the last look; own pages flagged then, and when flags were last cleared early.
    unread: u64,
    flagged: u64,
    flagged_before: u64,
    changed: u64,
    merging: Merging,
    drained: bool,
    watched_after: bool,
    /// Of the pause.
    #[cfg(test)]
    cost: stopped::Done,
}

enum Step {
    /// Look what there is to read.
    Look,
    /// Read: sheet and part to go on with.
    Read(usize, usize),
    Done,
}

impl SoftDirty {
    pub fn new(staging: Staging) -> Self {
        let open = |process| Ok(Box::new(KernelFlags::open(process)?) as Box<dyn PageFlags>);
        Self { held: Held::new(), known: None, staging, round: None, tracked: None, open }
    }

    /// Whether this engine sees all that is written to this guest's memory.
    pub fn probe(target: &Target, spec: &DomainSpec) -> Fitness {
        fitness::probe(target, spec)
    }

    fn open_round(&mut self) -> Result<(&Known, &mut Tracked, &mut Round), MemoryError> {
        match (&self.known, &mut self.tracked, &mut self.round) {
            (Some(known), Some(tracked), Some(round)) => Ok((known, tracked, round)),
            _ => Err(MemoryError::Order("no round is open")),
        }
    }

    /// Ends the round; what it knew to be owed stays so.
    fn close_round(&mut self) -> Option<Round> {
        let mut round = self.round.take()?;
        if let (Some(known), Some(tracked)) = (&self.known, &mut self.tracked) {
            for sheet in &mut round.sheets {
                let name = known.layout.blocks[sheet.block].block.name.clone();
                let owed = std::mem::replace(&mut sheet.owed, PageSet::none(0));
                tracked.owed.insert(name, (sheet.watch, owed));
            }
        }
        Some(round)
    }

    fn look(&mut self) -> Result<(), MemoryError> {
        let (_, tracked, round) = self.open_round()?;
        tracked.check_witnesses()?;
        let (mut unread, mut flagged, mut entries) = (0, 0, Vec::new());
        for sheet in &mut round.sheets {
            for part in sheet.parts() {
                let seen = part.see(&*tracked.flags, false, &mut entries)?;
                unread += seen.look.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                flagged += seen.flagged_own;
                tracked.add_witness(&part, &entries);
            }
        }
        let shrinks = round.rounds == 0 || unread <= round.unread / 2;
        (round.unread, round.flagged) = (unread, flagged);
        let go_on = unread > FEW && shrinks && round.rounds < ROUNDS_MAX;
        round.rounds += 1;
        round.step = if go_on { Step::Read(0, 0) } else { Step::Done };
        Ok(())
    }

    /// Reads some of what there is to read, while the guest runs.
    fn read_some(&mut self, sheet: usize, part: usize) -> Result<(), MemoryError> {
        let seed = self.held.seed();
        let (known, tracked, round) = self.open_round()?;
        let Some(reading) = round.sheets.get_mut(sheet) else {
            round.step = Step::Look;
            return Ok(());
        };
        round.step = Step::Read(sheet + 1, 0);
        let (mut entries, mut buffer, mut pages) = (Vec::new(), Vec::new(), 0);
        let mut emit = |group| round.ready.push_back(group);
        let mut gather = Gather::new(reading.block as u16, &mut emit);
        for (at, mut part) in reading.parts().enumerate().skip(part) {
            let seen = part.see(&*tracked.flags, false, &mut entries)?;
            round.changed += part.compare(known, &seen, seed, &mut buffer, &mut gather)?;
            pages += seen.look.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            if pages >= AT_ONCE {
                round.step = Step::Read(sheet, at + 1);
                break;
            }
        }
        gather.finish();
        Ok(())
    }

    fn sheet(
        held: &Held,
        tracked: &mut Tracked,
        at: usize,
        block: &RamBlock,
        watch: Watch,
        anew: bool,
    ) -> (Sheet, bool) {
        let pages = block.pages() as usize;
        let table = held.table(block);
        let full = table.is_none();
        let owed = tracked.owed.remove(&block.name).filter(|(before, owed)| {
            let still = *before == watch && !(watch == Watch::Head && anew);
            still && owed.is_for(pages) && tracked.cleared
        });
        // Unknown where a block was before, what it held, or what was written to it: all of it may have changed.
        let owed = match owed {
            Some((_, owed)) if !full => owed,
            _ => PageSet::all(pages),
        };
        // In a full image a page that is not sent is zero.
        let next = table.cloned().unwrap_or_else(|| vec![ZERO; pages]);
        (Sheet { block: at, watch, next, todo: owed.clone(), read: PageSet::none(pages), owed }, full)
    }
}

impl Tracked {
    fn of(process: QemuProcess, flags: Box<dyn PageFlags>) -> Self {
        let (owed, sent) = (Owed::new(), Lineage::default());
        Self { process, flags, cleared: false, owed, sent, witnesses: Vec::new(), mergeable: None }
    }

    /// What is owed since `basis`: also what points carried that were sent after it, which are lost then.
    fn back_to(&mut self, basis: Option<PointId>) {
        let Some(lost) = self.sent.back_to(basis) else {
            self.owed.clear();
            return;
        };
        for mut before in lost {
            // A block of which either knows nothing is owed whole.
            self.owed.retain(|name, (watch, owed)| {
                let same = before.remove(name).filter(|(before, _)| *before == *watch);
                same.is_some_and(|(_, before)| owed.add(&before))
            });
        }
    }

    /// The round's pages are on their way as `point`: nothing is owed since that.
    fn advance(&mut self, point: PointId) {
        let none = |(watch, owed): &(Watch, PageSet)| (*watch, owed.cleared());
        let next = self.owed.iter().map(|(name, owed)| (name.clone(), none(owed))).collect();
        self.sent.advance(point, std::mem::replace(&mut self.owed, next));
    }

    /// Whether flags that were seen are still there. Only clearing takes them away, and only we should do that.
    fn check_witnesses(&mut self) -> Result<(), MemoryError> {
        let mut entry = [Entry(0)];
        for address in &self.witnesses {
            self.flags.read(*address, &mut entry)?;
            if !entry[0].is_written() && !entry[0].is_gone() && !entry[0].is_shared() {
                self.distrust();
                let what = "somebody else cleared its page flags; all of it is compared at the next point";
                return Err(MemoryError::Changed { what: what.into() });
            }
        }
        Ok(())
    }

    fn may_be_merged(&mut self, merging: Merging) -> Result<bool, MemoryError> {
        if !merging.at_work {
            return Ok(merging.merged);
        }
        let mergeable = match self.mergeable {
            Some(known) => known,
            None => *self.mergeable.insert(fitness::is_mergeable(self.process)?),
        };
        Ok(merging.merged || mergeable)
    }

    /// The flags tell nothing of the time before now.
    fn distrust(&mut self) {
        self.cleared = false;
        self.owed.clear();
        self.sent.forget();
        self.witnesses.clear();
    }

    fn add_witness(&mut self, part: &sheet::Part, entries: &[Entry]) {
        if self.witnesses.len() < WITNESSES {
            self.witnesses.extend(part.witness(entries));
        }
    }
}

impl MemoryEngine for SoftDirty {
    fn name(&self) -> &'static str {
        "soft-dirty"
    }

    fn begin(&mut self, target: &Target, basis: Option<PointId>) -> Result<Vec<RamImage>, MemoryError> {
        self.put_back();
        self.held.keep_only(basis);
        let known = Known::look(self.known.take(), target)?;
        let known = self.known.insert(known);
        let process = target.process;
        let tracked = match self.tracked.take().filter(|tracked| tracked.process == process) {
            Some(tracked) => tracked,
            None => Tracked::of(process, (self.open)(process)?),
        };
        let tracked = self.tracked.insert(tracked);
        tracked.back_to(basis);
        let merging = Merging::of(process)?;
        let plain =
            if tracked.may_be_merged(merging)? { Vec::new() } else { fitness::told_by_flags(process)? };
        let (mut sheets, mut images) = (Vec::new(), Vec::new());
        for (at, placed) in known.layout.blocks.iter().enumerate() {
            let watch = match placed.place {
                Place::Head => Watch::Head,
                Place::Host { address } if process_memory::covers(&plain, address, placed.block.bytes) => {
                    Watch::Flags { address }
                }
                Place::Host { .. } => Watch::Nothing,
            };
            let (sheet, full) = Self::sheet(&self.held, tracked, at, &placed.block, watch, known.anew);
            sheets.push(sheet);
            images.push(RamImage { block: placed.block.clone(), full });
        }
        self.round = Some(Round {
            sheets,
            ready: VecDeque::new(),
            step: Step::Look,
            rounds: 0,
            early_pauses: 0,
            unread: 0,
            flagged: 0,
            flagged_before: u64::MAX,
            changed: 0,
            merging,
            drained: false,
            watched_after: false,
            #[cfg(test)]
            cost: stopped::Done::default(),
        });
        Ok(images)
    }

    fn wants_early_pause(&self) -> bool {
        let (Some(round), Some(tracked)) = (&self.round, &self.tracked) else { return false };
        let pages: usize = round.sheets.iter().map(|sheet| sheet.next.len()).sum();
        let first = !tracked.cleared && round.rounds == 0 && pages as u64 > MANY;
        let many = matches!(round.step, Step::Done)
            && round.flagged > MANY
            && round.flagged < round.flagged_before / 2;
        round.ready.is_empty() && round.early_pauses < EARLY_PAUSES_MAX && (first || many)
    }

    fn early_pause(&mut self) -> Result<(), MemoryError> {
        let (known, tracked, round) = self.open_round()?;
        known.check_layout()?;
        tracked.check_witnesses()?;
        let done = stopped::note_and_clear(&*tracked.flags, &mut round.sheets)?;
        tracked.cleared = true;
        tracked.witnesses.clear();
        round.flagged_before = done.flagged;
        round.early_pauses += 1;
        (round.rounds, round.step) = (0, Step::Look);
        tracing::debug!(
            flagged_pages = done.flagged,
            threads = done.threads,
            looking_us = done.looking.as_micros(),
            clearing_us = done.clearing.as_micros(),
            "page flags cleared before the cut"
        );
        Ok(())
    }

    fn before(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        loop {
            let (_, _, round) = self.open_round()?;
            if let Some(group) = round.ready.pop_front() {
                return Ok(Some(group));
            }
            match round.step {
                Step::Look => self.look()?,
                Step::Read(sheet, part) => self.read_some(sheet, part)?,
                Step::Done => return Ok(None),
            }
        }
    }

    fn drain(&mut self) -> Result<(), MemoryError> {
        let (seed, staging) = (self.held.seed(), &mut self.staging);
        let (Some(known), Some(tracked), Some(round)) = (&self.known, &mut self.tracked, &mut self.round)
        else {
            return Err(MemoryError::Order("no round is open"));
        };
        if round.drained || !round.ready.is_empty() || !matches!(round.step, Step::Done) {
            return Err(MemoryError::Order("drained before the running guest's pages were taken, or twice"));
        }
        known.check_layout()?;
        tracked.check_witnesses()?;
        round.drained = true;
        let done = stopped::drain(known, &*tracked.flags, &mut round.sheets, seed, staging)?;
        tracked.cleared = true;
        tracked.witnesses.clear();
        round.changed += done.changed;
        #[cfg(test)]
        {
            round.cost = done;
        }
        tracing::debug!(
            flagged_pages = done.flagged,
            read_pages = done.read,
            changed_pages = done.changed,
            threads = done.threads,
            looking_us = done.looking.as_micros(),
            comparing_us = done.comparing.as_micros(),
            clearing_us = done.clearing.as_micros(),
            "memory drained"
        );
        if round.sheets.iter().any(|sheet| matches!(sheet.watch, Watch::Flags { .. })) {
            round.merging.check_since(tracked.process)?;
        }
        known.check_alive()
    }

    fn after(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        let (_, tracked, round) = self.open_round()?;
        if !round.drained {
            return Err(MemoryError::Order("asked for staged pages before they were drained"));
        }
        if !std::mem::replace(&mut round.watched_after, true) {
            // The guest runs again: the first flags it sets are witnesses.
            let mut entries = Vec::new();
            for part in round.sheets.iter_mut().flat_map(Sheet::parts) {
                if tracked.witnesses.len() >= WITNESSES_AFTER {
                    break;
                }
                part.see(&*tracked.flags, false, &mut entries)?;
                tracked.add_witness(&part, &entries);
            }
        }
        self.staging.pop()
    }

    fn machine_config(&self) -> Vec<u8> {
        self.known.as_ref().map(|known| known.layout.head.config.clone()).unwrap_or_default()
    }

    fn changed_bytes(&self) -> u64 {
        self.round.as_ref().map_or(0, |round| round.changed * PAGE as u64)
    }

    fn sent(&mut self, point: PointId) {
        let Some(round) = self.close_round() else { return };
        if let (true, Some(known), Some(tracked)) = (round.drained, &self.known, &mut self.tracked) {
            // Whatever was owed, the point carries. What was written since is flagged.
            tracked.advance(point);
            let name = |sheet: &Sheet| known.layout.blocks[sheet.block].block.name.clone();
            self.held.replace(point, round.sheets.into_iter().map(|sheet| (name(&sheet), sheet.next)));
        }
        self.staging.clear();
    }

    fn settle(&mut self, point: PointId) {
        self.held.durable(point);
        if let Some(tracked) = &mut self.tracked {
            tracked.sent.durable(point);
        }
    }

    fn put_back(&mut self) {
        self.close_round();
        self.staging.clear();
    }

    fn hand_over(&mut self) -> Held {
        self.put_back();
        self.tracked = None;
        std::mem::take(&mut self.held)
    }

    fn take_over(&mut self, held: Held) {
        self.put_back();
        self.tracked = None;
        self.held = held;
    }
}
