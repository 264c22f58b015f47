# Thin: each target is a line or two into a script or cargo. CI runs `make test`; `make demo` is for people.
CARGO_FLAGS ?=
export PATH := $(PATH):$(HOME)/.cargo/bin
# Where cargo puts programs: they are built with the whole workspace, so that each is built once.
BUILT = $$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/$(if $(findstring --release,$(CARGO_FLAGS)),release,debug)
FAULTS := --features lifeboat-agent/fault-injection,lifeboat-site-controller/fault-injection

# The tests that have a guest, by the files that they are in.
END_TO_END := binary(failover) + binary(durability) + binary(harmless) + binary(link) + binary(memory_image) + binary(memory_engines) + binary(continuous) + \
	binary(database) + binary(moved) + binary(neighbour) + binary(hard_cases) + binary(groups) + binary(group_failover) + binary(after_resume) + binary(app_consistent) + binary(drill) + binary(holds) + binary(readiness) + binary(undo) + binary(api) + binary(large) + binary(failback) + binary(homeward) + binary(homeward_steps) + binary(source_returns) + binary(libvirt_lost) + binary(automatic) + binary(off) + binary(addresses) + binary(placement) + binary(runbook) + binary(prune)

.PHONY: demo bench soak test test-backports test-kvm lint deny deb setup build

# Two sites, a protected guest, a power cut, a failover; a group, a drill, a planned move: on one screen, and in
# target/demo/report.json.
demo: setup
	cargo build --workspace --bins $(CARGO_FLAGS)
	@$(BUILT)/demo

# What a point costs, beside what the machine could do at best: a table, and target/bench/report.json.
bench: setup
	cargo build --release --workspace --bins
	cargo bench --workspace --bench bench

# The agent killed and frozen at every step, 7 times each: more than 200 in all; half an hour of points; ten trips of
# a guest to the other site and home, and a failback of 1 GiB; and what takes more of a machine than `make test` may: twenty
# guests at once, and one of 16 GiB. LIFEBOAT_SOAK=N, LIFEBOAT_LONG_RUN=SECONDS, LIFEBOAT_TRIPS=N and LIFEBOAT_FAILBACK_MIB=N for
# other numbers.
soak: setup build
	LIFEBOAT_SOAK=$${LIFEBOAT_SOAK:-7} cargo test --workspace $(FAULTS) $(CARGO_FLAGS) --test watchdog -- --nocapture
	LIFEBOAT_LONG_RUN=$${LIFEBOAT_LONG_RUN:-1800} cargo test --workspace $(FAULTS) $(CARGO_FLAGS) --test long_run -- --nocapture
	LIFEBOAT_MANY=20 cargo test --workspace $(FAULTS) $(CARGO_FLAGS) --test hard_cases -- --nocapture of_many_guests
	cargo test --workspace $(FAULTS) $(CARGO_FLAGS) --test large -- --nocapture --ignored sixteen_gib
	LIFEBOAT_TRIPS=$${LIFEBOAT_TRIPS:-10} LIFEBOAT_FAILBACK_MIB=$${LIFEBOAT_FAILBACK_MIB:-1024} cargo test --workspace $(FAULTS) $(CARGO_FLAGS) --test failback --test homeward -- --nocapture --test-threads=1

# Everything that proves something. TESTS='-E test(power)' and the like narrow it.
test: setup build
	cargo nextest run --workspace $(FAULTS) $(CARGO_FLAGS) $(TESTS)

# The end-to-end tests on the other stack (QEMU 10.0, libvirt 11.3), on this machine's kernel.
test-backports: setup
	tests/kvm/test root backports $(or $(TESTS),-E '$(END_TO_END)')

# The same under real KVM, on both stacks, and 100 points of a busy guest compared byte by byte. Hours; by hand.
test-kvm: setup
	for flavour in bookworm backports; do \
		LIFEBOAT_CONTINUOUS_POINTS=$${LIFEBOAT_CONTINUOUS_POINTS:-100} \
		tests/kvm/test vm $$flavour --profile kvm $(or $(TESTS),-E '$(END_TO_END) + test(real_guest)') || failed=1; \
	done; test -z "$$failed"

lint:
	cargo fmt --all --check
	rustfmt --edition 2024 --check tests/guest/init.rs
	cargo clippy --workspace --all-targets $(FAULTS) $(CARGO_FLAGS) -- -D warnings
	@# Into a file of its own: as root, a compiler told to write to /dev/null replaces it.
	clippy-driver --edition 2024 -D warnings --emit metadata=$(BUILT)/guest-init.rmeta tests/guest/init.rs

# Licences and origins of everything that is compiled in. Not part of `test`: it is about Cargo.lock, and slow to install.
deny:
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check licenses bans sources

# The Debian packages, in <target>/debian.
deb:
	packaging/build-debs

# Installs and fetches what a Debian 12 machine lacks; quick when nothing does. Needs root.
setup:
	tests/setup.sh

# The daemons and the CLI as the tests drive them: with the steps at which a test may kill them.
build:
	cargo build --workspace --bins $(FAULTS) $(CARGO_FLAGS)
