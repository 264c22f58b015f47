//! Which host takes which replica. Promises: no host is given more memory than it has for replicas; a replica goes only
//! where it may; the same question has the same answer; where a search this short finds none, there is as good as none.
//! Pure. Called by `placing`.

use std::{cmp::Reverse, time::Instant};

/// What was given to a replica at a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise {
    pub host: usize,
    pub memory: u64,
    pub vcpus: u32,
    /// When it is void, if nothing is begun by then.
    pub until: Option<Instant>,
}

/// What a host has for replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bytes, beyond what is kept free and what was promised to others.
    pub memory: u64,
    pub cores: u32,
    /// Of all that run there, or are about to.
    pub vcpus: u32,
}

/// What a replica takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub memory: u64,
    pub vcpus: u32,
    /// Of each host, whether it may run there.
    pub may: Vec<bool>,
}

/// For one there was no host left, after others were given theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    pub wish: usize,
    /// Bytes that each host had left then.
    pub left: Vec<u64>,
}

/// A host for each of the wishes: of those with room, the one with the fewest vCPUs for each core, and of several such
/// the first. Who can go to the fewest hosts, and takes the most, goes first.
pub fn place(offers: &[Offer], wishes: &[Wish]) -> Result<Vec<usize>, Stuck> {
    let mut order: Vec<usize> = (0..wishes.len()).collect();
    let fits = |wish: &Wish| (0..offers.len()).filter(|at| has_room(offers, wish, *at)).count();
    order.sort_by_key(|at| (fits(&wishes[*at]), Reverse(wishes[*at].memory), *at));
    let mut search =
        Search { wishes, order, left: offers.to_vec(), given: vec![0; wishes.len()], stuck: None, steps: 0 };
    if search.from(0) {
        return Ok(search.given);
    }
    // Wishes that are none can't be stuck.
    Err(search.stuck.unwrap_or(Stuck { wish: 0, left: Vec::new() }))
}

fn has_room(offers: &[Offer], wish: &Wish, at: usize) -> bool {
    wish.may.get(at) == Some(&true) && offers[at].memory >= wish.memory
}

struct Search<'a> {
    wishes: &'a [Wish],
    order: Vec<usize>,
    left: Vec<Offer>,
    given: Vec<usize>,
    /// Where it was stuck first.
    stuck: Option<Stuck>,
    steps: u32,
}

impl Search<'_> {
    /// Whether all from `depth` on have a host.
    fn from(&mut self, depth: usize) -> bool {
        let Some(at) = self.order.get(depth).copied() else { return true };
        let wish = &self.wishes[at];
        let mut hosts: Vec<usize> =
            (0..self.left.len()).filter(|host| has_room(&self.left, wish, *host)).collect();
        hosts.sort_by(|a, b| {
            let [a, b] = [a, b].map(|host| (&self.left[*host], *host));
            let load = |of: &Offer, other: &Offer| {
                u64::from(of.vcpus.saturating_add(wish.vcpus)) * u64::from(other.cores.max(1))
            };
            (load(a.0, b.0), a.1).cmp(&(load(b.0, a.0), b.1))
        });
        for host in hosts {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                break;
            }
            let before = self.left[host];
            self.left[host].memory -= wish.memory;
            self.left[host].vcpus = before.vcpus.saturating_add(wish.vcpus);
            self.given[at] = host;
            if self.from(depth + 1) {
                return true;
            }
            self.left[host] = before;
        }
        let left = || self.left.iter().map(|offer| offer.memory).collect();
        self.stuck.get_or_insert_with(|| Stuck { wish: at, left: left() });
        false
    }
}

/// A group has 64 members at the most, and a site few hosts: what is not found by then was not to be had but by luck.
const STEPS_MAX: u32 = 20_000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offer(memory: u64, cores: u32, vcpus: u32) -> Offer {
        Offer { memory, cores, vcpus }
    }

    fn wish(memory: u64, vcpus: u32, may: &[bool]) -> Wish {
        Wish { memory, vcpus, may: may.to_vec() }
    }

    #[test]
    fn a_replica_goes_to_the_host_with_room_and_the_fewest_vcpus_for_each_core() {
        let any = [true, true, true];
        let of = |offers: &[Offer], wishes: &[Wish]| place(offers, wishes);
        let (idle, busy) = (offer(100, 8, 2), offer(100, 8, 9));
        assert_eq!(of(&[busy, idle, idle], &[wish(50, 2, &any)]), Ok(vec![1]), "of two alike, the first");
        assert_eq!(
            of(&[offer(40, 8, 0), busy, idle], &[wish(50, 2, &any)]),
            Ok(vec![2]),
            "room counts first"
        );
        assert_eq!(
            of(&[offer(99, 4, 2), offer(99, 16, 6)], &[wish(9, 1, &any)]),
            Ok(vec![1]),
            "for each core"
        );
        let two = [wish(60, 1, &any), wish(60, 1, &any)];
        assert_eq!(of(&[idle, idle], &two), Ok(vec![0, 1]), "what was given is gone");
        let stuck = of(&[idle, busy], &[two[0].clone(), two[1].clone(), wish(60, 1, &any)]).unwrap_err();
        assert_eq!(stuck, Stuck { wish: 2, left: vec![40, 40] });
        assert_eq!(of(&[idle, idle], &[wish(1, 1, &[false, false])]).unwrap_err().wish, 0);
        assert_eq!(of(&[], &[]), Ok(vec![]));
    }

    #[test]
    fn who_can_go_to_one_host_alone_is_not_left_out_for_who_could_have_gone_elsewhere() {
        let hosts = [offer(100, 8, 0), offer(100, 8, 4)];
        let wishes = [wish(80, 1, &[true, true]), wish(80, 1, &[true, false])];
        assert_eq!(place(&hosts, &wishes), Ok(vec![1, 0]));
        // The first way is a wrong one: it is gone back on.
        let hosts = [offer(10, 1, 0), offer(10, 1, 0)];
        let wishes = [4, 4, 3, 3, 3, 3].map(|memory| wish(memory, 0, &[true, true]));
        let given = place(&hosts, &wishes).unwrap();
        assert_eq!(given.iter().filter(|host| **host == 0).count(), 3, "{given:?}");
    }

    fn worlds() -> impl Strategy<Value = (Vec<Offer>, Vec<Wish>)> {
        (1usize..5).prop_flat_map(|hosts| {
            let offers = prop::collection::vec((0u64..40, 0u32..9, 0u32..9), hosts);
            let may = prop::collection::vec(any::<bool>(), hosts);
            let wishes = prop::collection::vec((0u64..20, 0u32..5, may), 0..6);
            (offers, wishes).prop_map(|(offers, wishes)| {
                let offers = offers.into_iter().map(|(memory, cores, vcpus)| offer(memory, cores, vcpus));
                let wishes = wishes.into_iter().map(|(memory, vcpus, may)| wish(memory, vcpus, &may));
                (offers.collect(), wishes.collect())
            })
        })
    }

    /// All there is to be tried.
    fn some_way(offers: &[Offer], wishes: &[Wish]) -> bool {
        let Some((first, rest)) = wishes.split_first() else { return true };
        (0..offers.len()).filter(|at| has_room(offers, first, *at)).any(|at| {
            let mut left = offers.to_vec();
            left[at].memory -= first.memory;
            some_way(&left, rest)
        })
    }

    proptest! {
        #[test]
        fn no_host_is_given_more_than_it_has_and_nobody_goes_where_he_may_not((offers, wishes) in worlds()) {
            let placed = place(&offers, &wishes);
            prop_assert_eq!(&placed, &place(&offers, &wishes), "the same question");
            prop_assert_eq!(placed.is_ok(), some_way(&offers, &wishes));
            let given = match placed {
                Ok(given) => given,
                Err(stuck) => {
                    prop_assert!(stuck.wish < wishes.len() && stuck.left.len() == offers.len());
                    return Ok(());
                }
            };
            prop_assert_eq!(given.len(), wishes.len());
            let mut left: Vec<u64> = offers.iter().map(|offer| offer.memory).collect();
            for (wish, host) in wishes.iter().zip(&given) {
                prop_assert!(wish.may[*host]);
                prop_assert!(left[*host] >= wish.memory, "over-committed");
                left[*host] -= wish.memory;
            }
        }
    }
}
