//! Agent, protocol and store in one seeded world: a link that loses, a site that loses power at any durable step, a disk
//! that fills, an agent that is killed anywhere, a guest that works on. Real: protection actor, sealing, both session
//! halves, slots, store, restore. Stand-ins: the guest, the link, the disk, the clock. A failure prints its seed.

// All of it is test code: what can't fail here must fail the test.
#![allow(clippy::unwrap_used)]

mod copies;
mod fleet;
mod kept;
mod lossy_link;
mod model_guest;
mod model_witness;
mod world;

use lifeboat::format::frame::Codec;
use rand::Rng;
use std::sync::atomic::Ordering;
use world::World;

/// Worlds of one run. Another first seed by `LIFEBOAT_SIM_SEED`, more of them by `LIFEBOAT_SIM_WORLDS`.
const WORLDS: u64 = 400;
const EVENTS: u32 = 120;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn in_world(seed: u64, story: impl AsyncFnOnce(&mut World)) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed).await;
        story(&mut world).await;
    });
}

/// Goal: I-1, I-2, I-3. Method: random faults; after each return of the site, and at the end, every point that the agent
/// was told is durable is there, and every point that is there holds exactly what the guest held at its instant; once
/// the faults end, protection catches up by itself.
#[test]
fn what_was_acknowledged_is_found_and_what_is_found_is_exact() {
    let (first, worlds) = (setting("LIFEBOAT_SIM_SEED", 1), setting("LIFEBOAT_SIM_WORLDS", WORLDS));
    let (mut points, mut overlapped, mut words, mut refs) = (0, 0, 0, 0);
    for seed in first..first + worlds {
        in_world(seed, async |world| {
            for _ in 0..EVENTS {
                world.event().await;
            }
            world.heal().await;
            world.catches_up().await;
            world.check("at the end").await;
            points += world.settled().len();
            overlapped += world.overlapped();
            words += world.shipped[Codec::Words as usize].load(Ordering::Relaxed);
            refs += world.shipped[Codec::Refs as usize].load(Ordering::Relaxed);
        });
    }
    assert!(points as u64 > worlds * 5, "too few points ({points}) came about for this to mean anything");
    assert!(overlapped > worlds * 3, "too few points ({overlapped}) were cut while others were under way");
    assert!(words > worlds && refs > worlds, "too few words ({words}) or references ({refs})");
}

/// Goal: I-4. Method: raise the generation at a random moment of a working world; from then on nothing is committed,
/// whatever the agent, a restarted agent, or the links do.
#[test]
fn after_a_failover_nothing_of_the_old_source_is_committed() {
    let first = setting("LIFEBOAT_SIM_SEED", 1);
    for seed in first..first + 100 {
        in_world(seed, async |world| {
            world.heal().await;
            let events = world.rng.random_range(10..60);
            for _ in 0..events {
                world.event().await;
            }
            world.heal().await;
            // There is something to fail over to.
            world.catches_up().await;
            world.raise_generation().await;
            let held = world.points().await;
            for _ in 0..30 {
                world.event().await;
            }
            world.heal().await;
            world.pass(20_000).await;
            assert_eq!(world.points().await, held, "seed {seed}: the fenced source still wrote");
            world.check("after the failover").await;
        });
    }
}

/// Goal: never two running copies that both believe that the VM is theirs (docs/safety.md, I-7). Method: more than a
/// thousand times the line or the power of a host goes and comes back, with the VM failed over and home again at any
/// moment, or not; after each event, and at every look of the agent's, what must hold is held against what is; in the
/// end the guest runs exactly where it should.
#[test]
fn a_thousand_times_cut_off_and_back_no_two_copies_believe_that_the_vm_is_theirs() {
    let (first, worlds) = (setting("LIFEBOAT_SIM_SEED", 1), setting("LIFEBOAT_SIM_WORLDS", WORLDS) * 5);
    let (mut returns, mut fenced, mut homes) = (0, 0, 0);
    for seed in first..first + worlds {
        let mut world = copies::run(seed, 40);
        world.comes_to_rest();
        (returns, fenced, homes) = (returns + world.returns, fenced + world.fenced, homes + world.homes);
        if seed % 4 == 0 {
            world.is_allowed_and_runs();
        }
    }
    println!("{worlds} worlds: {returns} returns, {fenced} copies fenced, {homes} came home");
    assert!(
        worlds < WORLDS * 5 || (returns >= 1_000 && fenced >= 500 && homes >= 50),
        "{returns} {fenced} {homes}"
    );
}

/// Goal: with a witness no replica is started by the site while the source's guest runs (docs/safety.md, I-7), and no
/// guest stands for long whose agent reaches the site or the witness. Method: lines that are cut between each two of the
/// three, messages lost on their way there or back, agent or guard frozen or dead at any moment, controllers killed,
/// clocks that differ; in the end exactly one copy runs.
#[test]
fn a_thousand_worlds_with_a_witness_never_have_two_copies_that_run() {
    let (first, worlds) = (setting("LIFEBOAT_SIM_SEED", 1), setting("LIFEBOAT_SIM_WORLDS", WORLDS) * 5);
    let (mut failovers, mut pauses) = (0, 0);
    for seed in first..first + worlds {
        let mut world = kept::World::new(seed);
        for _ in 0..40 {
            world.event();
        }
        world.comes_to_rest();
        assert_eq!(world.harm, None, "world {seed}: the guest stood for no reason");
        (failovers, pauses) = (failovers + world.failovers, pauses + world.pauses);
    }
    println!("{worlds} worlds: {failovers} failovers, {pauses} pauses");
    assert!(worlds < WORLDS * 5 || (failovers >= 500 && pauses >= 1_000), "{failovers} {pauses}");
}
