package rig

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// accelerator chooses between KVM and emulation. /dev/kvm existing and even
// opening does not mean that a guest runs (nested virtualisation may hang it),
// so the node's kernel is booted once without a disk: it must come as far as
// panicking over that. The answer is kept until this machine reboots.
func accelerator(ctx context.Context, image NodeImage) ([]string, error) {
	emulated := []string{"-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off"}
	native := []string{"-accel", "kvm", "-cpu", "host"}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return emulated, nil
	}
	f.Close()
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("probing KVM: %w", err)
	}
	dir, err := cached(ctx, "kvm", strings.TrimSpace(string(bootID)), func(ctx context.Context, dir string) error {
		probe, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		argv := append([]string{"qemu-system-x86_64", "-machine", "q35", "-m", "512", "-nodefaults", "-display", "none",
			"-no-reboot", "-serial", "stdio", "-kernel", image.path("vmlinuz"), "-append", "console=ttyS0 panic=-1"}, native...)
		said, err := run(probe, "", nil, argv...)
		verdict := "no\n"
		if err == nil && strings.Contains(said, "Unable to mount root fs") {
			verdict = "yes\n"
		}
		slog.InfoContext(ctx, "probed KVM", "works", strings.TrimSpace(verdict))
		return os.WriteFile(filepath.Join(dir, "works"), []byte(verdict), 0o644)
	})
	if err != nil {
		return nil, fmt.Errorf("probing KVM: %w", err)
	}
	verdict, err := os.ReadFile(filepath.Join(dir, "works"))
	if err != nil {
		return nil, fmt.Errorf("probing KVM: %w", err)
	}
	if strings.TrimSpace(string(verdict)) == "yes" {
		return native, nil
	}
	return emulated, nil
}
