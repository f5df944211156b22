#!/usr/bin/env bash
# Boots a machine of its own (qemu without KVM, a Debian kernel from the cache)
# and runs there what this machine may lack: cgroup v2 controllers, all layers of
# the sandbox together. Ends with the result of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

scripts/setup-test.sh vm
kernel=$(echo "$cache_bin"/vm-kernel/boot/vmlinuz-*)
version=${kernel##*/vmlinuz-}
modules=$(find "$cache_bin/vm-kernel" -type d -path "*/modules/$version/kernel" | head -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export CGO_ENABLED=0
go build -trimpath -ldflags '-s -w' -o "$work/init" ./assurance/vm/init
go build -o "$work/pack" ./assurance/vm/pack
go test -c -tags vm -ldflags '-s -w' -o "$work/sandbox.test" ./assurance/sandbox
printf -- '-test.v -test.timeout=110s -test.run=^(TestVM.*|TestEscapes|TestEgress|TestNoSurvivors|TestTakeOver)$' >"$work/sandbox.args"

items=("$work/init=/init" "$work/sandbox.test=/tests/sandbox.test" "$work/sandbox.args=/tests/sandbox.test.args"
	/dev/ /proc/ /sys/ /tmp/ /run/ /var/tmp/ /etc/ /usr/bin/ /mnt/
	"$(command -v busybox)=/bin/busybox")
for applet in sh sleep true cat ls echo env kill yes setsid mkdir rm; do
	items+=("/bin/busybox>/bin/$applet")
done
items+=("/bin/busybox>/usr/bin/unshare")
order=10
for name in virtio_blk crc16 mbcache libcrc32c crc32c_generic crc32c-cryptoapi jbd2 ext4; do # built in, or a module: as the kernel has it
	file=$(find "$modules" -name "$name.ko*" | head -1)
	[ -n "$file" ] || continue
	case $file in
	*.xz) xz -dc "$file" >"$work/$order-$name.ko" ;;
	*.zst) zstd -qdc "$file" >"$work/$order-$name.ko" ;;
	*) cp "$file" "$work/$order-$name.ko" ;;
	esac
	items+=("$work/$order-$name.ko=/modules/$order-$name.ko")
	order=$((order + 1))
done
"$work/pack" "$work/initrd" "${items[@]}"
truncate -s 64M "$work/disk"
PATH=$PATH:/usr/sbin:/sbin mkfs.ext4 -q "$work/disk"

say vm-test "kernel $version"
timeout -k 5 180 qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu max,-cx16,-la57 -smp 2 -m 768 \
	-nodefaults -no-user-config -display none -no-reboot -serial stdio -kernel "$kernel" -initrd "$work/initrd" \
	-append "console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off nokaslr lsm=landlock,bpf random.trust_cpu=on tsc=reliable no_timer_check psi=1" \
	-drive "file=$work/disk,if=none,id=d0,format=raw,cache=writeback" -device virtio-blk-pci,drive=d0 </dev/null | tee "$work/console" || true
result=$(sed -n 's/^vm-test: result \([0-9]*\).*/\1/p' "$work/console" | tail -1)
[ "${result:-}" = 0 ] || die "the tests in the machine failed, or it did not come to an end"
