//! The network interfaces that a guest's agent tells of.
//! Promises: what is taken of an answer can be given back to the guest as an argument of a program; how much is taken has a
//! bound; what does not fit is left out, and an answer of another shape is an error. Pure.

use crate::address::{Address, Mac};
use serde_json::Value;
use std::collections::BTreeMap;

/// One of a guest's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: Option<Mac>,
    pub addresses: Vec<Address>,
}

/// Of the answer to `guest-network-get-interfaces`, those that have a name. `None`: it is none.
pub(super) fn read(answer: &Value) -> Option<Vec<Interface>> {
    let mut found = BTreeMap::<&str, Interface>::new();
    for told in answer.as_array()?.iter().take(INTERFACES_MAX) {
        let Some(name) = told.get("name").and_then(Value::as_str).and_then(name) else { continue };
        let mac = told.get("hardware-address").and_then(Value::as_str);
        let mac = mac.and_then(|mac| mac.parse().ok()).filter(Mac::is_a_card_s);
        let new = || Interface { name: name.to_owned(), mac, addresses: Vec::new() };
        let addresses = &mut found.entry(name).or_insert_with(new).addresses;
        let told = told.get("ip-addresses").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let left = ADDRESSES_MAX.saturating_sub(addresses.len());
        addresses.extend(told.iter().filter_map(address).take(left));
    }
    Some(found.into_values().collect())
}

/// As a kernel takes it. An address of its own that has a label is told as if it were another interface: `eth0:1`.
fn name(told: &str) -> Option<&str> {
    let name = told.split(':').next().unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    let known = !matches!(name, "" | "." | "..") && name.len() <= NAME_MAX && !name.starts_with('-');
    (known && name.bytes().all(plain)).then_some(name)
}

fn address(told: &Value) -> Option<Address> {
    let ip = told.get("ip-address")?.as_str()?.parse().ok()?;
    Address::new(ip, told.get("prefix")?.as_u64()?.try_into().ok()?)
}

const INTERFACES_MAX: usize = 1024;
const ADDRESSES_MAX: usize = 256;
/// The kernel's IFNAMSIZ, without the zero at the end.
const NAME_MAX: usize = 15;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn what_an_agent_tells_is_read_and_what_no_kernel_would_take_is_left_out() {
        let told = json!([
            { "name": "lo", "hardware-address": "00:00:00:00:00:00",
              "ip-addresses": [{ "ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8 }] },
            { "name": "eth0", "hardware-address": "52:54:00:12:34:56", "ip-addresses": [
                { "ip-address-type": "ipv4", "ip-address": "10.1.0.5", "prefix": 24 },
                { "ip-address-type": "ipv6", "ip-address": "fe80::1", "prefix": 64 },
                { "ip-address": "10.1.0.6", "prefix": 33 }, { "ip-address": "10.1.0.7; reboot", "prefix": 24 },
                { "ip-address": "10.1.0.8" }, 7] },
            { "name": "eth0:1", "hardware-address": "52:54:00:12:34:56",
              "ip-addresses": [{ "ip-address": "10.1.0.9", "prefix": 24 }] },
            { "name": "tun0" },
            { "name": "-rf" }, { "name": "a b" }, { "name": "a/b" }, { "name": "" }, { "name": "sixteen-letters-x" }, {}, 3,
        ]);
        let found = read(&told).unwrap();
        let names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, ["eth0", "lo", "tun0"]);
        let addresses: Vec<String> = found[0].addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.1.0.5/24", "fe80::1/64", "10.1.0.9/24"]);
        assert_eq!((found[0].mac, found[1].mac), ("52:54:00:12:34:56".parse().ok(), None));
        assert_eq!((read(&json!({})), read(&json!(null))), (None, None));
    }

    #[test]
    fn of_an_endless_answer_no_more_is_taken_than_its_bound() {
        let address = json!({ "ip-address": "10.1.0.5", "prefix": 24 });
        let count = |at| if at < 3 { 300 } else { 0 };
        let one =
            |at: usize| json!({ "name": format!("e{at}"), "ip-addresses": vec![address.clone(); count(at)] });
        let found = read(&Value::Array((0..1100).map(one).collect())).unwrap();
        assert_eq!(found.len(), INTERFACES_MAX);
        assert_eq!(found[0].addresses.len(), ADDRESSES_MAX);
    }

    proptest! {
        #[test]
        fn whatever_is_told_no_name_is_taken_that_a_program_would_read_as_something_else(
            name in "\\PC{0,20}", mac in "\\PC{0,20}", ip in "[0-9a-f.:]{0,40}", prefix in any::<i64>(),
        ) {
            let told = json!([{ "name": name, "hardware-address": mac, "ip-addresses": [{ "ip-address": ip, "prefix": prefix }] }]);
            for found in read(&told).unwrap() {
                prop_assert!(!found.name.is_empty() && !found.name.starts_with('-') && found.name.len() <= NAME_MAX);
                prop_assert!(found.name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':'));
            }
        }
    }
}
