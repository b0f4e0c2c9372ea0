package probes

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hosthygiene/agent/pkg/host"
)

// Require is what this host must have: the `require:` section of the config. It
// is checked always, and repaired when remedies say so.
type Require struct {
	// Packages by capability ("iscsi") or by literal name.
	Packages []RequiredPackage `json:"packages,omitempty"`
	// Devices by a stable /dev/disk name.
	Devices []RequiredDevice `json:"devices,omitempty"`
	// Units and the state they must be in.
	Units []RequiredUnit `json:"units,omitempty"`
	// Modules that must be loaded or built in.
	Modules []string `json:"modules,omitempty"`
	// Sysctls: a value, or a bound such as ">=131072".
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// Files with content of ours.
	Files []RequiredFile `json:"files,omitempty"`
	// OOMScores of units' main processes.
	OOMScores []RequiredOOMScore `json:"oomScores,omitempty"`
	// Multipath is what multipathd's configuration in force must say.
	Multipath RequiredMultipath `json:"multipath,omitzero"`
}

// RequiredPackage is a capability or a package name; in the config a plain
// string or {name: nfs, names: {debian: nfs-common}}.
type RequiredPackage struct {
	// Name is a capability ("iscsi", "multipath", "nfs", ...) or, where it is
	// none, the package's own name.
	Name string `json:"name"`
	// Names overrides the package name by os-release ID or ID_LIKE.
	Names map[string]string `json:"names,omitempty"`
}

// UnmarshalJSON accepts the short form.
func (p *RequiredPackage) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, &p.Name) == nil {
		return nil
	}
	type plain RequiredPackage
	return json.Unmarshal(data, (*plain)(p))
}

// RequiredDevice is a block device that must be there.
type RequiredDevice struct {
	// ID is a path below /dev/disk/by-id, /dev/disk/by-path or /dev/disk/azure;
	// * and ? match within a name.
	ID string `json:"id"`
	// Count is how many devices must match; 0 means 1.
	Count int `json:"count,omitempty"`
	// MinSize of each, e.g. 100Gi.
	MinSize *resource.Quantity `json:"minSize,omitempty"`
	// MountedAt is where it must be mounted.
	MountedAt string `json:"mountedAt,omitempty"`
	// FSType is the file system expected there.
	FSType string `json:"fsType,omitempty"`
}

// RequiredUnit is a systemd unit and the state it must be in.
type RequiredUnit struct {
	Name string `json:"name"`
	// Enabled: true wants it started at boot, false never; without it either
	// is right.
	Enabled *bool `json:"enabled,omitempty"`
	// Active: true wants it running, false not; without it, it must run unless
	// enabled is false.
	Active *bool `json:"active,omitempty"`
}

// MustRun reports whether the unit is required to be active.
func (u RequiredUnit) MustRun() bool {
	if u.Active == nil {
		return u.Enabled == nil || *u.Enabled
	}
	return *u.Active
}

// MustStart reports whether the unit is required to be enabled.
func (u RequiredUnit) MustStart() bool { return u.Enabled != nil && *u.Enabled }

// RequiredFile is a file whose content is ours.
type RequiredFile struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	// Mode in octal, such as "0644"; without it any mode is right.
	Mode string `json:"mode,omitempty"`
	// Owner as user, or user:group, by name or number; without it any is right.
	Owner string `json:"owner,omitempty"`
	// OnlyIfMissing: the file must exist; the content is what a missing one is
	// made with, and one that is there may say anything.
	OnlyIfMissing bool `json:"onlyIfMissing,omitempty"`
	// Distributions limits it to some, by os-release ID or ID_LIKE; without it
	// it is required on all.
	Distributions []string `json:"distributions,omitempty"`
}

// AppliesTo reports whether the file is required on a host with this system.
func (f RequiredFile) AppliesTo(os host.OS) bool {
	return len(f.Distributions) == 0 || slices.ContainsFunc(osIDs(os), func(id string) bool { return slices.Contains(f.Distributions, id) })
}

// RequiredOOMScore is the oom_score_adj a unit's main process must have.
type RequiredOOMScore struct {
	Unit  string `json:"unit"`
	Score int    `json:"score"`
}

// RequiredMultipath is what multipathd's configuration in force must say. What
// makes it say so is a file in /etc/multipath/conf.d, required beside it.
type RequiredMultipath struct {
	// Defaults are settings in force for devices without one of their own.
	Defaults map[string]string `json:"defaults,omitempty"`
	// Devices are settings for one vendor's devices.
	Devices []RequiredMultipathDevice `json:"devices,omitempty"`
}

// RequiredMultipathDevice is what must be in force for one model of device.
type RequiredMultipathDevice struct {
	// Vendor and Product of a device as its device/vendor and device/model in
	// /sys/block say, such as "LIO-ORG" and "TCMU device"; no patterns.
	Vendor  string `json:"vendor"`
	Product string `json:"product"`
	// Settings of the device section of multipath.conf(5).
	Settings map[string]string `json:"settings"`
}

// HasPackage reports whether a capability or package is required.
func (r Require) HasPackage(name string) bool {
	return slices.ContainsFunc(r.Packages, func(p RequiredPackage) bool { return p.Name == name })
}

// HasModule reports whether a kernel module is required; '-' and '_' are the
// same in module names.
func (r Require) HasModule(name string) bool {
	return slices.ContainsFunc(r.Modules, func(m string) bool { return moduleKey(m) == moduleKey(name) })
}

// HasUnit reports whether a unit is required to be active.
func (r Require) HasUnit(name string) bool {
	return slices.ContainsFunc(r.Units, func(u RequiredUnit) bool {
		return u.Name == name && u.MustRun()
	})
}

// Validate returns a FieldError for everything impossible.
func (r Require) Validate() error {
	var errs []error
	for i, p := range r.Packages {
		if !validPackageName(p.Name) {
			errs = append(errs, fieldErr(fmt.Sprintf("packages[%d]", i), "%q is no package name: want letters, digits, '+', '-', '.', '_' and no leading '-'", p.Name))
		}
		for id, n := range p.Names {
			if !validPackageName(n) {
				errs = append(errs, fieldErr(fmt.Sprintf("packages[%d].names.%s", i, id), "%q is no package name", n))
			}
		}
	}
	for i, d := range r.Devices {
		at := fmt.Sprintf("devices[%d]", i)
		if !strings.HasPrefix(d.ID, "/dev/disk/") || path.Clean(d.ID) != d.ID {
			errs = append(errs, fieldErr(at+".id", "%q is not a stable name: want a path below /dev/disk/by-id, by-path or azure", d.ID))
		} else if _, err := path.Match(d.ID, ""); err != nil {
			errs = append(errs, fieldErr(at+".id", "%q is no valid pattern", d.ID))
		}
		if d.Count < 0 {
			errs = append(errs, fieldErr(at+".count", "want 1 or more, not %d", d.Count))
		}
		if d.MountedAt != "" && (!path.IsAbs(d.MountedAt) || path.Clean(d.MountedAt) != d.MountedAt) {
			errs = append(errs, fieldErr(at+".mountedAt", "want a clean absolute path, not %q", d.MountedAt))
		}
		if d.MountedAt != "" && d.Count > 1 {
			errs = append(errs, fieldErr(at+".mountedAt", "%d devices can not be mounted at one place", d.Count))
		}
		if d.FSType != "" && d.MountedAt == "" {
			errs = append(errs, fieldErr(at+".fsType", "is checked on the mount: give mountedAt too"))
		}
	}
	for i, u := range r.Units {
		if !validUnitName(u.Name) {
			errs = append(errs, fieldErr(fmt.Sprintf("units[%d].name", i), "%q is no unit name: want one with its suffix, such as chronyd.service", u.Name))
		}
	}
	for i, m := range r.Modules {
		if !moduleName.MatchString(m) {
			errs = append(errs, fieldErr(fmt.Sprintf("modules[%d]", i), "%q is no module name: want one as in lsmod, such as iscsi_tcp", m))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Sysctls)) {
		if err := validSysctl(name, r.Sysctls[name]); err != nil {
			errs = append(errs, fieldErr("sysctls."+name, "%s", err))
		}
	}
	for i, f := range r.Files {
		errs = append(errs, f.validate(fmt.Sprintf("files[%d]", i))...)
	}
	errs = append(errs, r.Multipath.validate()...)
	for i, o := range r.OOMScores {
		at := fmt.Sprintf("oomScores[%d]", i)
		if !validUnitName(o.Unit) {
			errs = append(errs, fieldErr(at+".unit", "%q is no unit name: want one with its suffix, such as multipathd.service", o.Unit))
		}
		if o.Score < -1000 || o.Score > 1000 {
			errs = append(errs, fieldErr(at+".score", "want -1000 to 1000, not %d", o.Score))
		}
	}
	return errors.Join(errs...)
}

func validPackageName(s string) bool {
	if s == "" || s[0] == '-' || s[0] == '.' || len(s) > 200 {
		return false
	}
	return !strings.ContainsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("+-._", c))
	})
}

// validUnitName follows systemd.unit(5).
func validUnitName(s string) bool {
	dot := strings.LastIndexByte(s, '.')
	if dot < 1 || len(s) > 255 {
		return false
	}
	if !slices.Contains([]string{"service", "socket", "mount", "timer", "path", "target", "slice", "scope", "swap", "device", "automount"}, s[dot+1:]) {
		return false
	}
	return !strings.ContainsFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune(":-_.\\@", c))
	})
}

var (
	moduleName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
	fileMode   = regexp.MustCompile(`^0[0-7]{3}$`)
	fileOwner  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?$`)
	osID       = regexp.MustCompile(`^[a-z0-9._-]+$`)
)

// maxFileContent is far above any drop-in; the whole config has 256 KiB.
const maxFileContent = 64 << 10

// fileDirs are the directories in which a file may be required, and how its
// name must end for the program that reads the directory to see it. It is a
// list of what is allowed because whoever may edit the config must not be able
// to have the agent write passwd, sudoers or a static pod: each of these is a
// directory of drop-ins, where a file of ours replaces nobody's. "*" stands for
// one name.
var fileDirs = []struct{ dir, suffix string }{
	{"/etc/multipath/conf.d", ".conf"},
	{"/etc/modules-load.d", ".conf"},
	{"/etc/modprobe.d", ".conf"},
	{"/etc/sysctl.d", ".conf"},
	{"/etc/tmpfiles.d", ".conf"},
	{"/etc/security/limits.d", ".conf"},
	{"/etc/udev/rules.d", ".rules"},
	{"/etc/chrony/conf.d", ".conf"},
	{"/etc/chrony/sources.d", ".sources"},
	{"/etc/chrony.d", ".conf"},
	{"/etc/nfs.conf.d", ".conf"},
	{"/etc/nfsmount.conf.d", ".conf"},
	{"/etc/systemd/system/*.d", ".conf"},
	{"/etc/systemd/system.conf.d", ".conf"},
	{"/etc/systemd/journald.conf.d", ".conf"},
	{"/etc/systemd/logind.conf.d", ".conf"},
	{"/etc/systemd/timesyncd.conf.d", ".conf"},
}

// seedFiles may be required with onlyIfMissing: programs that do not start
// without the file, though any content will do.
var seedFiles = []string{"/etc/multipath.conf"}

func (f RequiredFile) validate(at string) []error {
	var errs []error
	if problem := validFilePath(f); problem != "" {
		errs = append(errs, fieldErr(at+".path", "%s", problem))
	}
	if len(f.Content) > maxFileContent {
		errs = append(errs, fieldErr(at+".content", "has %d bytes, and %d are the most", len(f.Content), maxFileContent))
	}
	if f.Mode != "" && !fileMode.MatchString(f.Mode) {
		errs = append(errs, fieldErr(at+".mode", "want four octal digits, such as \"0644\", not %q", f.Mode))
	}
	if f.Owner != "" && !fileOwner.MatchString(f.Owner) {
		errs = append(errs, fieldErr(at+".owner", "want a user or user:group, such as root:root, not %q", f.Owner))
	}
	for i, id := range f.Distributions {
		if !osID.MatchString(id) {
			errs = append(errs, fieldErr(fmt.Sprintf("%s.distributions[%d]", at, i), "%q is no ID of os-release, such as debian or rhel", id))
		}
	}
	return errs
}

func validFilePath(f RequiredFile) string {
	if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || len(f.Path) > 1024 {
		return fmt.Sprintf("want a clean absolute path, not %q", f.Path)
	}
	if slices.Contains(seedFiles, f.Path) {
		if f.OnlyIfMissing {
			return ""
		}
		return fmt.Sprintf("%s is the administrator's: require it with onlyIfMissing: true, and put settings into a file of your own in %s", f.Path, fileDirs[0].dir)
	}
	dir, base := path.Split(f.Path)
	for _, d := range fileDirs {
		if ok, err := path.Match(d.dir, path.Clean(dir)); err != nil || !ok {
			continue
		}
		if base[0] == '.' || len(base) <= len(d.suffix) || !strings.HasSuffix(base, d.suffix) {
			return fmt.Sprintf("nothing reads %s there: in %s a name must end in %s and not begin with a dot", base, path.Clean(dir), d.suffix)
		}
		return ""
	}
	return "no file may be required there: want a directory of drop-ins, such as /etc/multipath/conf.d, /etc/sysctl.d or /etc/systemd/system/UNIT.d (docs/profiles.md lists them)"
}

// FilePlaces are the patterns of path.Match that the paths of require.files must
// match, and those that take onlyIfMissing besides.
func FilePlaces() (dropins, seeds []string) {
	for _, d := range fileDirs {
		dropins = append(dropins, d.dir+"/*"+d.suffix)
	}
	return dropins, slices.Clone(seedFiles)
}

func (m RequiredMultipath) validate() []error {
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(m.Defaults)) {
		if !validMultipathSetting(key, m.Defaults[key]) {
			errs = append(errs, fieldErr("multipath.defaults."+key, "want a setting of multipath.conf's defaults section on one line"))
		}
	}
	seen := map[[2]string]int{}
	for i, d := range m.Devices {
		at := fmt.Sprintf("multipath.devices[%d]", i)
		if d.Vendor == "" || d.Product == "" {
			errs = append(errs, fieldErr(at, "want vendor and product as in /sys/block/sdX/device/vendor and model"))
		}
		if j, dup := seen[[2]string{d.Vendor, d.Product}]; dup {
			errs = append(errs, fieldErr(at, "%s %s is listed twice: it is multipath.devices[%d] too", d.Vendor, d.Product, j))
		}
		seen[[2]string{d.Vendor, d.Product}] = i
		for _, key := range slices.Sorted(maps.Keys(d.Settings)) {
			if !validMultipathSetting(key, d.Settings[key]) {
				errs = append(errs, fieldErr(at+".settings."+key, "want a setting of a device section of multipath.conf on one line"))
			}
		}
	}
	return errs
}

func validMultipathSetting(key, value string) bool {
	return key != "" && !strings.ContainsAny(key, " \t\n\"{}") && !strings.ContainsAny(value, "\n\"{}")
}
