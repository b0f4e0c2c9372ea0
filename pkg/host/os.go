package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// systemInfo keeps what detectOS found for systemFor: all of it but the upgrade of
// a running system is settled at boot.
type systemInfo struct {
	mu sync.Mutex // held for a look only
	os OS
	at time.Time
}

const systemFor = 15 * time.Minute

func (s *systemInfo) read(ctx context.Context, r *Root) (OS, error) {
	s.mu.Lock()
	o, at := s.os, s.at
	s.mu.Unlock()
	if !at.IsZero() && time.Since(at) < systemFor && !clockSet(at) {
		return o, nil
	}
	// All probes ask at once, and the mount table of a busy node is megabytes:
	// one of them reads, the others wait. Nobody's leaving must fail the rest.
	found, _, err := share(ctx, &r.calls, "the operating system", func() (foundOS, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), defaultLimit)
		defer cancel()
		o, err := detectOS(ctx, r)
		if err == nil {
			s.mu.Lock()
			s.os, s.at = o, time.Now()
			s.mu.Unlock()
		}
		return foundOS{o, err}, nil
	})
	if err != nil {
		return OS{ID: "linux"}, err
	}
	return found.os, found.err
}

// clockSet says whether the clock of the day was set since a time that this
// process has read from it: the time of the boot is reckoned from the clock, and
// moves with it.
func clockSet(since time.Time) bool {
	now := time.Now()
	return (now.Round(0).Sub(since.Round(0)) - now.Sub(since)).Abs() >= time.Second
}

// foundOS is an answer of detectOS, whose value counts beside its error.
type foundOS struct {
	os  OS
	err error
}

// detectOS tells the distribution, from os-release(5), and how its software is
// managed: by name where the distribution is known, and by evidence on the host,
// because derivatives of every distribution exist in an immutable edition. What
// could be read is returned beside an error.
func detectOS(ctx context.Context, files Files) (OS, error) {
	o, evidence := OS{ID: "linux"}, osEvidence{}
	var errs []error
	read := func(name string) []byte {
		data, err := files.ReadFile(ctx, name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		return data
	}

	release := read("/etc/os-release")
	if release == nil {
		release = read("/usr/lib/os-release")
	}
	fields := parseOSRelease(release)
	if id := fields["ID"]; id != "" {
		o.ID = id
	}
	o.VariantID, o.VersionID, o.IDLike = fields["VARIANT_ID"], fields["VERSION_ID"], strings.Fields(fields["ID_LIKE"])

	o.Kernel = string(bytes.TrimSpace(read("/proc/sys/kernel/osrelease")))
	o.Init = string(bytes.TrimSpace(read("/proc/1/comm")))
	o.BootID = string(bytes.TrimSpace(read("/proc/sys/kernel/random/boot_id")))
	if stat := read("/proc/stat"); stat != nil {
		at, err := parseBootTime(stat)
		if err != nil {
			errs = append(errs, fmt.Errorf("/proc/stat: %w", err))
		}
		o.BootTime = at
	}

	exists := func(name string) bool {
		_, err := files.Lstat(ctx, name)
		return err == nil
	}
	evidence.ostree = exists("/run/ostree-booted")
	evidence.transactional = exists("/usr/sbin/transactional-update")
	evidence.packages = slices.ContainsFunc([]string{"/usr/bin/dpkg", "/usr/bin/rpm", "/bin/rpm", "/sbin/apk", "/usr/bin/pacman"}, exists)
	mounts, err := usrLines(ctx, files, "/proc/1/mountinfo")
	if errors.Is(err, fs.ErrPermission) { // not root: by hand, PID 1's mounts are ours
		mounts, err = usrLines(ctx, files, "/proc/self/mountinfo")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	evidence.usr = usrMount(mounts)
	if dev := evidence.usr.dev; dev != "" {
		uuid, _ := files.ReadFile(ctx, "/sys/dev/block/"+dev+"/dm/uuid")
		evidence.verity = bytes.HasPrefix(uuid, []byte("CRYPT-VERITY-"))
	}
	o.Class, o.Why = classify(o, evidence)
	return o, errors.Join(errs...)
}

// osEvidence is what the host itself shows of how it is managed.
type osEvidence struct {
	ostree        bool // /run/ostree-booted, made by ostree-prepare-root
	transactional bool // transactional-update is installed
	packages      bool // a package manager is installed
	verity        bool // the mount below is a dm-verity device
	usr           usrMountInfo
}

// usrMountInfo is the mount that holds /usr.
type usrMountInfo struct {
	point, dev, fsType string
	// ro is set when the mount and its superblock are read-only. The superblock
	// alone turns so when ext4 gives up on a failing disk: that host is broken,
	// not immutable.
	ro bool
}

// distributions says how the distributions that run Kubernetes are managed, by
// ID or ID:VARIANT_ID of os-release(5).
var distributions = map[string]OSClass{
	"debian": Mutable, "ubuntu": Mutable, "raspbian": Mutable, "linuxmint": Mutable,
	"rhel": Mutable, "centos": Mutable, "rocky": Mutable, "almalinux": Mutable, "fedora": Mutable, "ol": Mutable,
	"amzn": Mutable, "azurelinux": Mutable, "mariner": Mutable, "photon": Mutable, "openEuler": Mutable, "anolis": Mutable,
	"sles": Mutable, "sle_hpc": Mutable, "opensuse-leap": Mutable, "opensuse-tumbleweed": Mutable, "opensuse": Mutable, "suse": Mutable,
	"arch": Mutable, "alpine": Mutable,

	"sle-micro": Transactional, "sl-micro": Transactional, "suse-microos": Transactional,
	// SUSE Linux Micro has been SLES with a variant since 6.2.
	"sles:transactional": Transactional,
	"opensuse-microos":   Transactional, "opensuse-leap-micro": Transactional, "sle-micro-rancher": Transactional,

	// RHCOS called itself rhcos until 4.18 and is RHEL with a variant since.
	"rhcos": OSTree, "scos": OSTree, "rhel:coreos": OSTree, "centos:coreos": OSTree, "fedora:coreos": OSTree,
	"fedora:iot": OSTree, "fedora:silverblue": OSTree, "fedora:kinoite": OSTree,

	"flatcar": Image, "coreos": Image, "cos": Image, "bottlerocket": Image, "talos": Image,
	// Azure Linux with a /usr that is an image.
	"azurecontainerlinux": Image, "azurelinux:azurecontainerlinux": Image, "azurelinux:osguard": Image,
	"ubuntu-core": Image, "nixos": Image, "kairos": Image,
}

// classify judges by ID and VARIANT_ID, then by the evidence, then by ID_LIKE;
// evidence beats a name that only says what the distribution usually is.
func classify(o OS, e osEvidence) (OSClass, string) {
	named, known := distributions[o.ID+":"+o.VariantID]
	why := "os-release has ID=" + o.ID + " and VARIANT_ID=" + o.VariantID
	if !known {
		named, known = distributions[o.ID]
		why = "os-release has ID=" + o.ID
	}
	if known && named != Mutable {
		return named, why
	}
	readOnlyType := slices.Contains([]string{"squashfs", "erofs", "cramfs", "romfs", "iso9660"}, e.usr.fsType)
	switch {
	case e.ostree:
		return OSTree, "/run/ostree-booted exists"
	case e.transactional && e.usr.ro:
		return Transactional, "transactional-update is installed and " + e.usr.point + " is mounted read-only"
	case e.verity:
		return Image, e.usr.point + " is on a dm-verity device"
	case readOnlyType:
		return Image, e.usr.point + " is a read-only " + e.usr.fsType
	case e.usr.ro:
		return Image, e.usr.point + " is mounted read-only"
	case known:
		return named, why
	}
	for _, like := range o.IDLike {
		if class, ok := distributions[like]; ok && (class == Mutable) == e.packages {
			return class, "os-release has ID_LIKE=" + strings.Join(o.IDLike, " ")
		}
	}
	if e.packages {
		return Mutable, "a package manager is installed"
	}
	return Image, "no package manager is installed"
}

// parseOSRelease reads the assignments of os-release(5): shell syntax without
// expansion. Lines that are none are passed over, as the page demands of
// readers.
func parseOSRelease(data []byte) map[string]string {
	fields := map[string]string{}
	for line := range bytes.Lines(data) {
		key, value, ok := strings.Cut(strings.TrimSpace(string(line)), "=")
		if !ok || key == "" || strings.Trim(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_") != "" {
			continue
		}
		if value, ok := unquote(value); ok {
			fields[key] = value
		}
	}
	return fields
}

// unquote undoes shell quoting of one word.
func unquote(s string) (string, bool) {
	var out strings.Builder
	for i := 0; i < len(s); {
		switch c := s[i]; c {
		case '\'':
			end := strings.IndexByte(s[i+1:], '\'')
			if end < 0 {
				return "", false
			}
			out.WriteString(s[i+1 : i+1+end])
			i += end + 2
		case '"':
			for i++; ; i++ {
				if i >= len(s) {
					return "", false
				}
				if s[i] == '"' {
					i++
					break
				}
				if s[i] == '\\' && i+1 < len(s) && strings.IndexByte("$\"\\`", s[i+1]) >= 0 {
					i++
				}
				out.WriteByte(s[i])
			}
		case '\\':
			if i+1 == len(s) {
				return "", false
			}
			out.WriteByte(s[i+1])
			i += 2
		case ' ', '\t':
			// The word ends; a comment may follow.
			return out.String(), true
		default:
			out.WriteByte(c)
			i++
		}
	}
	return out.String(), true
}

// parseBootTime finds btime in /proc/stat, seconds since the epoch.
func parseBootTime(data []byte) (time.Time, error) {
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("btime ")); ok {
			sec, err := strconv.ParseInt(string(bytes.TrimSpace(rest)), 10, 64)
			if err != nil || sec < 0 || sec > 1<<40 {
				return time.Time{}, fmt.Errorf("btime %q is no time", bytes.TrimSpace(rest))
			}
			return time.Unix(sec, 0), nil
		}
	}
	return time.Time{}, errors.New("no btime line")
}

// usrLines reads the lines of a mount table that may be of interest to usrMount:
// the table of a large host is tens of megabytes.
func usrLines(ctx context.Context, files Files, name string) ([]byte, error) {
	var kept []byte
	lines := Lines{Each: func(line []byte) {
		if p := mountPoint(line); bytes.HasSuffix(line, []byte("\n")) && (string(p) == "/" || string(p) == "/usr") {
			kept = append(kept, line...)
		}
	}}
	if err := files.ReadThrough(ctx, name, MaxMountTable, lines.Take); err != nil {
		return nil, err
	}
	return kept, nil
}

// mountPoint is field 5 of a line of a mount table.
func mountPoint(line []byte) []byte {
	for range 4 {
		_, line, _ = bytes.Cut(line, []byte(" "))
	}
	point, _, _ := bytes.Cut(line, []byte(" "))
	return point
}

// usrMount finds the mount that holds /usr in proc_pid_mountinfo(5). Later lines
// lie over earlier ones.
func usrMount(data []byte) usrMountInfo {
	var root, usr usrMountInfo
	for line := range bytes.Lines(data) {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
		if p := mountPoint(line); string(p) != "/" && string(p) != "/usr" {
			continue
		}
		head, tail, ok := bytes.Cut(line, []byte(" - "))
		if !ok {
			continue
		}
		f, g := bytes.Fields(head), bytes.Fields(tail)
		if len(f) < 6 || len(g) < 1 {
			continue
		}
		m := usrMountInfo{point: string(f[4]), dev: string(f[2]), fsType: string(g[0])}
		m.ro = hasOption(f[5], "ro") && hasOption(g[len(g)-1], "ro")
		switch m.point {
		case "/":
			root, usr = m, usrMountInfo{}
		case "/usr":
			usr = m
		}
	}
	if usr.point != "" {
		return usr
	}
	return root
}

func hasOption(options []byte, want string) bool {
	for o := range bytes.SplitSeq(options, []byte(",")) {
		if string(o) == want {
			return true
		}
	}
	return false
}
