//! What a host can run, as libvirt describes it (`virConnectGetDomainCapabilities`). Promises: pure. Called by `libvirt`.

use super::XML_MAX;
use xmltree::Element;

/// The program that would run the guest.
pub fn emulator(xml: &str) -> Option<String> {
    if xml.len() > XML_MAX {
        return None;
    }
    let path = Element::parse(xml.as_bytes()).ok()?.get_child("path")?.get_text()?.trim().to_owned();
    (!path.is_empty()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulator_is_read_as_libvirt_names_it_and_what_names_none_has_none() {
        let named = "<domainCapabilities>\n  <path>/usr/bin/qemu-system-x86_64</path>\n  <domain>qemu</domain>\n</domainCapabilities>";
        assert_eq!(emulator(named).as_deref(), Some("/usr/bin/qemu-system-x86_64"));
        for none in
            ["", "no XML", "<domainCapabilities/>", "<domainCapabilities><path> </path></domainCapabilities>"]
        {
            assert_eq!(emulator(none), None, "{none}");
        }
    }
}
