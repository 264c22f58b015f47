//! What QEMU says of a guest's processors (`info registers -a`), as far as it tells that the guest will never go on.
//! Promises: what can't be read is no proof. Pure. Called by `libvirt`.

/// Whether every processor is halted and takes no interrupts: nothing that runs in the guest will ever run again. Of x86; of
/// others QEMU does not say it.
pub fn halted_for_good(text: &str) -> bool {
    let mut processors = text.split("CPU#").filter(|part| !part.trim().is_empty()).peekable();
    processors.peek().is_some()
        && processors.all(|part| is_halted(part) && takes_interrupts(part) == Some(false))
}

fn is_halted(processor: &str) -> bool {
    processor.split_whitespace().any(|word| word == "HLT=1")
}

/// By the flag IF.
fn takes_interrupts(processor: &str) -> Option<bool> {
    let mut words = processor.split_whitespace();
    let flags = words.find_map(|word| word.strip_prefix("RFL=").or_else(|| word.strip_prefix("EFL=")))?;
    u64::from_str_radix(flags, 16).ok().map(|flags| flags & (1 << 9) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 prints it, shortened.
    fn processor(no: u32, flags: &str, halted: u32) -> String {
        format!(
            "\r\nCPU#{no}\r\nRAX=0000000000000000 RBX=ffffffff82010940\r\nR8 =0000000000000001 R9 =0000000000000001\r\n\
             RIP=ffffffff81c0e5a5 RFL={flags} [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT={halted}\r\nES =0000 00000000\r\n"
        )
    }

    #[test]
    fn a_guest_goes_on_as_long_as_one_processor_may() {
        let (on, off) = ("00000246", "00000046");
        assert!(halted_for_good(&processor(0, off, 1)));
        assert!(halted_for_good(&(processor(0, off, 1) + &processor(1, off, 1))));
        assert!(!halted_for_good(&processor(0, on, 1)), "idle");
        assert!(!halted_for_good(&processor(0, off, 0)), "at work");
        assert!(!halted_for_good(&(processor(0, off, 1) + &processor(1, on, 1))));
        for unknown in ["", "\r\n", "PC=0000 X00=0000 HLT=1", "RFL=zz HLT=1"] {
            assert!(!halted_for_good(unknown), "{unknown:?}");
        }
    }
}
