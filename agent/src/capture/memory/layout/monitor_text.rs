//! What QEMU's human monitor prints of its memory, read without trust: a line that is not understood is passed over.

/// One line of `info ramblock`.
#[derive(Debug, PartialEq, Eq)]
pub struct PrintedBlock {
    pub name: String,
    /// Host address; printed from QEMU 9.0 on.
    pub host: Option<u64>,
}

/// One RAM or ROM range of `info mtree -f`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatRange {
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

/// Lines like `  0000000000100000-0000000007ffffff (prio 0, ram): pc.ram @0000000000100000 KVM`, of any view: the same
/// range may come more than once, and is kept once.
pub fn flat_ranges(text: &str) -> Vec<FlatRange> {
    let mut found: Vec<FlatRange> = Vec::new();
    for range in text.lines().filter_map(flat_range) {
        if !found.contains(&range) {
            found.push(range);
        }
    }
    found
}

fn flat_range(line: &str) -> Option<FlatRange> {
    let (place, rest) = line.trim_start().split_once(" (prio ")?;
    let start = u64::from_str_radix(place.split_once('-')?.0, 16).ok()?;
    let (kind, rest) = rest.split_once("): ")?;
    let kind = kind.split_once(", ")?.1;
    if !matches!(kind, "ram" | "rom" | "romd" | "nv-ram") {
        return None;
    }
    let mut words = rest.split_whitespace();
    let name = words.next()?.to_owned();
    let offset = words.next().and_then(|word| word.strip_prefix('@'));
    let offset = match offset {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => 0,
    };
    Some(FlatRange { start, name, offset })
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
        let tree = "FlatView #1\n AS \"memory\", root: system\n Root memory region: system\n\
            \x20 0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM\n\
            \x20 00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n\
            \x20 00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000\n\
            \x20 00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\n";
        let range = |start, name: &str, offset| FlatRange { start, name: name.into(), offset };
        assert_eq!(
            flat_ranges(&tree.repeat(2)),
            [range(0, "pc.ram", 0), range(0xc0000, "pc.ram", 0xc0000), range(0xfd00_0000, "vga.vram", 0)]
        );
        assert_eq!(
            host_address("Host virtual address for 0x0 (pc.ram) is 0x7f00\r\n"),
            Some(("pc.ram", 0x7f00))
        );
        assert_eq!(host_address("No memory is mapped at address 0x0"), None);
    }
}
