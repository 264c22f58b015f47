//! Where a guest's serial console is written to, by its definition. Pure. Called by `waits`.

use std::path::PathBuf;
use xmltree::{Element, XMLNode};

/// A file.
#[derive(Debug, PartialEq, Eq)]
pub struct Console {
    pub file: PathBuf,
    /// What was there before stays.
    pub grows: bool,
}

/// `None`: it is written to no file.
pub fn console(xml: &str) -> Option<Console> {
    let domain = Element::parse(xml.as_bytes()).ok()?;
    let devices = domain.get_child("devices")?.children.iter().filter_map(XMLNode::as_element);
    let is = |element: &Element, name: &str, value: &str| {
        element.attributes.get(name).is_some_and(|is| is == value)
    };
    let mut written = devices.filter(|device| device.name == "serial" && is(device, "type", "file"));
    let source = written.next()?.get_child("source")?;
    Some(Console { file: source.attributes.get("path")?.into(), grows: is(source, "append", "on") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_found_where_it_is_a_file_however_libvirt_or_we_quote() {
        let domain = |serial: &str| format!("<domain><devices><disk/>{serial}</devices></domain>");
        let pty = "<serial type='pty'><source path='/dev/pts/1'/></serial>";
        assert_eq!(console(&domain(pty)), None);
        let grows =
            domain(&format!("{pty}<serial type='file'><source path='/log/web' append='on'/></serial>"));
        let found = console(&grows);
        assert_eq!(found, Some(Console { file: "/log/web".into(), grows: true }));
        assert_eq!(found, console(&grows.replace('\'', "\"")));
        assert_eq!(console(&grows.replace(" append='on'", "")).map(|console| console.grows), Some(false));
        assert_eq!(console("<domain"), None);
    }
}
