//! What QEMU's human monitor prints of its memory, read without trust: a line that is not understood is passed over.
//! `info mtree -f` would be simpler to read, but each time it is asked QEMU 7.2 keeps the devices that it then has for
//! ever (`mtree_info` in its memory.c takes a reference to a view for each address space, and gives one back for all that
//! share it): such a device can't be unplugged any more.

use std::{collections::BTreeMap, ops::RangeInclusive};

/// Aliases of aliases that are followed.
const ALIASES_MAX: usize = 4;
/// Ranges that are noted: a large guest has some dozens.
const RANGES_MAX: usize = 4096;

/// One line of `info ramblock`.
#[derive(Debug, PartialEq, Eq)]
pub struct PrintedBlock {
    pub name: String,
    /// Host address; printed from QEMU 9.0 on.
    pub host: Option<u64>,
}

/// Where the guest sees a part of a RAM block, if nothing lies over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// Guest address.
    pub start: u64,
    pub name: String,
    /// Where in the block the range starts.
    pub offset: u64,
}

pub fn ram_blocks(text: &str) -> Vec<PrintedBlock> {
    let lines = text.lines().skip(1);
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        let numbers: Vec<u64> = words.filter_map(hex).collect();
        // Offset, used and total length, and the address where it is printed.
        (numbers.len() >= 3)
            .then(|| PrintedBlock { name, host: numbers.get(3).copied().filter(|host| *host != 0) })
    };
    lines.filter_map(entry).collect()
}

/// RAM and ROM of the address space `memory`, as `info mtree` prints it: a tree of regions, of which some are aliases of
/// parts of regions that are printed by themselves. Each range is told once.
pub fn guest_ranges(text: &str) -> Vec<GuestRange> {
    let mut trees: BTreeMap<&str, Vec<Region>> = BTreeMap::new();
    let mut tree = None;
    for line in text.lines() {
        let named = line.strip_prefix("address-space: ").or_else(|| line.strip_prefix("memory-region: "));
        match (named, &tree) {
            (Some(name), _) => tree = Some(name.trim_end()),
            (None, Some(name)) => trees.entry(name).or_default().extend(region(line)),
            (None, None) => {}
        }
    }
    let mut found = Vec::new();
    visit(&trees, "memory", 0..=u64::MAX, 0, ALIASES_MAX, &mut found);
    found
}

/// One line of a tree.
#[derive(Debug)]
struct Region {
    range: RangeInclusive<u64>,
    name: String,
    is_memory: bool,
    /// Where the range begins in the region named, if that one is another.
    alias_at: Option<u64>,
}

/// Notes what of a tree lies in `window`, which begins at the guest's address `at`.
fn visit(
    trees: &BTreeMap<&str, Vec<Region>>,
    tree: &str,
    window: RangeInclusive<u64>,
    at: u64,
    aliases: usize,
    found: &mut Vec<GuestRange>,
) {
    for region in trees.get(tree).into_iter().flatten() {
        let from = *region.range.start().max(window.start());
        let to = *region.range.end().min(window.end());
        let Some(start) = at.checked_add(from - window.start()).filter(|_| from <= to) else { continue };
        let Some(offset) = region.alias_at.unwrap_or(0).checked_add(from - region.range.start()) else {
            continue;
        };
        let range = GuestRange { start, name: region.name.clone(), offset };
        if region.is_memory {
            if found.len() < RANGES_MAX && !found.contains(&range) {
                found.push(range);
            }
        } else if region.alias_at.is_some() && aliases > 0 {
            let part = offset..=offset.saturating_add(to - from);
            visit(trees, &region.name, part, start, aliases - 1, found);
        }
    }
}

/// Reads `  00000000000e0000-00000000000fffff (prio 1, rom): alias isa-bios @pc.bios 0000000000020000-000000000003ffff`
/// and the like.
fn region(line: &str) -> Option<Region> {
    let (place, rest) = line.trim_start().split_once(" (prio ")?;
    let (kind, rest) = rest.split_once("): ")?;
    if rest.contains("[disabled]") {
        return None;
    }
    let is_memory = matches!(kind.split_once(", ")?.1, "ram" | "rom" | "romd" | "nv-ram");
    let range = addresses(place)?;
    let Some(rest) = rest.strip_prefix("alias ") else {
        let name = rest.split_whitespace().next()?.to_owned();
        return Some(Region { range, name, is_memory, alias_at: None });
    };
    let (_, rest) = rest.split_once(" @")?;
    let (name, part) = rest.trim_end().rsplit_once(' ')?;
    Some(Region { range, name: name.to_owned(), is_memory, alias_at: Some(*addresses(part)?.start()) })
}

/// `00000000000a0000-00000000000bffff`.
fn addresses(text: &str) -> Option<RangeInclusive<u64>> {
    let (start, end) = text.split_once('-')?;
    let address = |digits: &str| u64::from_str_radix(digits, 16).ok();
    Some(address(start)?..=address(end)?)
}

/// `Host virtual address for 0x0 (pc.ram) is 0x7f…`: the region's name and the address.
pub fn host_address(answer: &str) -> Option<(&str, u64)> {
    let (_, rest) = answer.split_once(" (")?;
    let (name, rest) = rest.split_once(") is ")?;
    Some((name, hex(rest.trim())?))
}

fn hex(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_7_and_10_print_is_understood() {
        let seven = "              Block Name    PSize              Offset               Used              Total\r\n\
             \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\r\n";
        assert_eq!(ram_blocks(seven), [PrintedBlock { name: "pc.ram".into(), host: None }]);
        let ten = "    Block Name    PSize   Offset   Used   Total   HVA  RO\n\
                   pc.bios    4 KiB  0x10100000 0x40000 0x40000 0x00007f11a0000000 ro\n";
        assert_eq!(ram_blocks(ten), [PrintedBlock { name: "pc.bios".into(), host: Some(0x7f11_a000_0000) }]);
        assert_eq!(
            host_address("Host virtual address for 0x0 (pc.ram) is 0x7f00\r\n"),
            Some(("pc.ram", 0x7f00))
        );
        assert_eq!(host_address("No memory is mapped at address 0x0"), None);
    }
    fn range(start: u64, name: &str, offset: u64) -> GuestRange {
        GuestRange { start, name: name.into(), offset }
    }

    #[test]
    fn a_tree_of_regions_says_where_memory_is_seen() {
        let tree = "address-space: cpu-memory-0\r\naddress-space: memory\r\n\
            \x20 0000000000000000-ffffffffffffffff (prio 0, i/o): system\r\n\
            \x20   0000000000000000-00000000087fffff (prio 0, ram): alias ram-below-4g @pc.ram 0000000000000000-00000000087fffff\r\n\
            \x20   0000000000000000-ffffffffffffffff (prio -1, i/o): pci\r\n\
            \x20     00000000000c0000-00000000000dffff (prio 1, rom): pc.rom\r\n\
            \x20     00000000000e0000-00000000000fffff (prio 1, rom): alias isa-bios @pc.bios 0000000000020000-000000000003ffff\r\n\
            \x20     00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\r\n\
            \x20     00000000fe000000-00000000fe00ffff (prio 1, ram): gone [disabled]\r\n\
            \x20   00000000000a0000-00000000000bffff (prio 1, i/o): alias smram-region @pci 00000000000a0000-00000000000bffff\r\n\
            \r\naddress-space: other\r\n\
            \x20 0000000000000000-00000000000fffff (prio 0, ram): not.the.guests\r\n";
        assert_eq!(
            guest_ranges(tree),
            [
                range(0, "pc.ram", 0),
                range(0xc0000, "pc.rom", 0),
                range(0xe0000, "pc.bios", 0x20000),
                range(0xfd00_0000, "vga.vram", 0)
            ]
        );
    }

    /// With several backends `ram` is a container, of which the guest sees the parts at other addresses.
    #[test]
    fn memory_of_several_nodes_is_found_behind_the_hole_below_4_gib() {
        let tree = "address-space: memory\n\
            \x20 0000000000000000-ffffffffffffffff (prio 0, i/o): system\n\
            \x20   0000000000000000-000000007fffffff (prio 0, i/o): alias ram-below-4g @ram 0000000000000000-000000007fffffff\n\
            \x20   0000000100000000-000000017fffffff (prio 0, i/o): alias ram-above-4g @ram 0000000080000000-00000000ffffffff\n\
            memory-region: ram\n\
            \x20 0000000000000000-00000000ffffffff (prio 0, i/o): ram\n\
            \x20   0000000000000000-000000005fffffff (prio 0, ram): ram-node0\n\
            \x20   0000000060000000-00000000ffffffff (prio 0, ram): ram-node1\n";
        assert_eq!(
            guest_ranges(tree),
            [
                range(0, "ram-node0", 0),
                range(0x6000_0000, "ram-node1", 0),
                range(0x1_0000_0000, "ram-node1", 0x2000_0000)
            ]
        );
    }

    #[test]
    fn regions_that_are_aliases_of_each_other_come_to_an_end() {
        let tree = "address-space: memory\n\
            \x20 0000000000000000-ffffffffffffffff (prio 0, i/o): alias a @memory 0000000000000000-ffffffffffffffff\n\
            \x20 ffffffffffffffff-0000000000000000 (prio 0, ram): upside.down\n\
            \x20 0000000000001000-0000000000001fff (prio 0, ram): alias far @x ffffffffffffffff-ffffffffffffffff\n";
        assert_eq!(guest_ranges(tree), [range(0x1000, "x", u64::MAX)]);
    }
}
