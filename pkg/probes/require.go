package probes

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
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
	Name    string `json:"name"`
	Enabled *bool  `json:"enabled,omitempty"`
	Active  *bool  `json:"active,omitempty"`
}

// RequiredFile is a file whose content is ours.
type RequiredFile struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode,omitempty"`
	Owner   string `json:"owner,omitempty"`
}

// RequiredOOMScore is the oom_score_adj a unit's main process must have.
type RequiredOOMScore struct {
	Unit  string `json:"unit"`
	Score int    `json:"score"`
}

// HasPackage reports whether a capability or package is required.
func (r Require) HasPackage(name string) bool {
	return slices.ContainsFunc(r.Packages, func(p RequiredPackage) bool { return p.Name == name })
}

// HasModule reports whether a kernel module is required; '-' and '_' are the
// same in module names.
func (r Require) HasModule(name string) bool {
	norm := func(s string) string { return strings.ReplaceAll(s, "-", "_") }
	return slices.ContainsFunc(r.Modules, func(m string) bool { return norm(m) == norm(name) })
}

// HasUnit reports whether a unit is required to be active.
func (r Require) HasUnit(name string) bool {
	return slices.ContainsFunc(r.Units, func(u RequiredUnit) bool {
		return u.Name == name && (u.Active == nil || *u.Active)
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
	for i, f := range r.Files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path {
			errs = append(errs, fieldErr(fmt.Sprintf("files[%d].path", i), "want a clean absolute path, not %q", f.Path))
		}
	}
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
