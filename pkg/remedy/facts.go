package remedy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// Facts is what a plan needs to know of the host besides the findings.
type Facts struct {
	OS      host.OS
	Systemd bool
	Manager Manager
	// ListsAt is when apt's lists were last refreshed; zero when never.
	ListsAt time.Time
	// Files are those that might be written, as they are now.
	Files map[string]FileFact
	// Owners resolves the owners required files name.
	Owners map[string][2]uint32
	// ModulesListed are the modules some file has loaded at boot.
	ModulesListed map[string]bool
	// Modprobe is where the host has it.
	Modprobe string
	// Units that are to be changed, by name.
	Units map[string]host.Unit
	MCO   MCO
	// ReadOnlyMounts are mount points that can not be written.
	ReadOnlyMounts map[string]bool
	// Past are the results of earlier steps, oldest first.
	Past []Result
	Left []Left
	// Unseen is what could not be read.
	Unseen []string
}

// FileFact is a file as it is now.
type FileFact struct {
	Exists, Symlink bool
	Data            string
	Mode            fs.FileMode
	UID, GID        uint32
	Err             string
}

// MCO is OpenShift's Machine Config Operator on this node.
type MCO struct {
	Present bool
	// Files are those of the rendered config in force.
	Files map[string]bool
	// Err is why they are not known; then none may be written.
	Err string
}

// ReadOnly tells whether a path lies on a mount that can not be written.
func (f Facts) ReadOnly(name string) bool {
	for dir := name; ; dir = path.Dir(dir) {
		if ro, mounted := f.ReadOnlyMounts[dir]; mounted {
			return ro
		}
		if dir == "/" {
			return false
		}
	}
}

// Observe reads the facts for a plan. It writes nothing and starts nothing.
func Observe(ctx context.Context, view host.View, require probes.Require, reports []finding.Report) (Facts, error) {
	o := observer{View: view, ctx: ctx, facts: Facts{
		Files: map[string]FileFact{}, Owners: map[string][2]uint32{}, ModulesListed: map[string]bool{}, Units: map[string]host.Unit{},
	}}
	f := &o.facts
	var err error
	if f.OS, err = view.OS(ctx); err != nil {
		return *f, fmt.Errorf("which system this is: %w", err)
	}
	f.Systemd = f.OS.Init == "systemd"
	o.manager()
	o.mco()
	o.mounts()
	o.modules()
	for _, name := range []string{"/usr/sbin/modprobe", "/sbin/modprobe"} {
		if o.exists(name) {
			f.Modprobe = name
			break
		}
	}
	files, units := []string{modulesFile, sysctlFile, initiatorFile}, []string{"multipathd.service"}
	for _, r := range reports {
		for _, fd := range r.Findings {
			if fd.Remedy == nil {
				continue
			}
			switch fd.Remedy.Action {
			case finding.WriteFile:
				files = append(files, fd.Remedy.Subject)
			case finding.SetOOMScore, finding.PersistOOMScore:
				files = append(files, path.Join("/etc/systemd/system", fd.Remedy.Subject+".d", dropInName))
			case finding.EnableUnit, finding.StartUnit, finding.UnmaskUnit:
				units = append(units, fd.Remedy.Subject)
			}
		}
	}
	for _, name := range files {
		if _, seen := f.Files[name]; !seen {
			f.Files[name] = o.file(name)
		}
	}
	for _, rf := range require.Files {
		if rf.Owner != "" {
			o.owner(rf.Owner)
		}
	}
	if f.Systemd {
		slices.Sort(units)
		list, err := view.Units(ctx, slices.Compact(units)...)
		if err != nil && !errors.Is(err, host.ErrNotLive) {
			o.unseen("the units to be changed", err)
		}
		for _, u := range list {
			f.Units[u.Name] = u
		}
	}
	records, err := readRecords(ctx, view)
	if err != nil {
		o.unseen("what the agent did before", err)
	}
	f.Past, f.Left = pastOf(records), leftOf(ctx, view, records)
	return *f, nil
}

type observer struct {
	host.View
	ctx   context.Context
	facts Facts
}

func (o *observer) unseen(what string, err error) {
	o.facts.Unseen = append(o.facts.Unseen, fmt.Sprintf("%s: %v", what, err))
}

func (o *observer) exists(name string) bool {
	_, err := o.Stat(o.ctx, name)
	return err == nil
}

func (o *observer) manager() {
	f := &o.facts
	switch f.OS.Class {
	case host.Image, host.OSTree:
		return
	case host.Transactional:
		if o.exists(Transactional.program()) {
			f.Manager = Transactional
		}
		return
	}
	for _, m := range candidates(f.OS) {
		if o.exists(m.program()) {
			f.Manager = m
			break
		}
	}
	if f.Manager != Apt {
		return
	}
	// The lists bear the server's times; apt makes and removes files beside
	// them whenever it has asked.
	names, err := o.ReadDir(o.ctx, "/var/lib/apt/lists")
	if err != nil || !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "_") }) {
		return
	}
	for _, name := range []string{"/var/lib/apt/lists", "/var/lib/apt/lists/partial", "/var/lib/apt/periodic/update-success-stamp"} {
		if st, err := o.Stat(o.ctx, name); err == nil && st.ModTime.After(f.ListsAt) {
			f.ListsAt = st.ModTime
		}
	}
}

const (
	mcoDir     = "/etc/machine-config-daemon"
	mcoCurrent = mcoDir + "/currentconfig"
)

func (o *observer) mco() {
	f := &o.facts
	coreOS := f.OS.ID == "rhcos" || f.OS.ID == "scos" || f.OS.ID == "rhel" && f.OS.VariantID == "coreos"
	_, err := o.Lstat(o.ctx, mcoDir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !coreOS:
		return
	case errors.Is(err, fs.ErrNotExist):
		f.MCO = MCO{Present: true, Err: "there is no " + mcoDir + " on this CoreOS"}
		return
	case err != nil:
		f.MCO = MCO{Present: true, Err: err.Error()}
		return
	}
	f.MCO.Present = true
	data, err := o.ReadFile(o.ctx, mcoCurrent)
	if err == nil {
		f.MCO.Files, err = parseMachineConfig(data)
	}
	if err != nil {
		f.MCO.Err = fmt.Sprintf("%s says nothing: %v", mcoCurrent, err)
	}
}

// parseMachineConfig reads the rendered MachineConfig in force: the files and
// units of its Ignition config, versions 2 and 3
// (github.com/coreos/ignition, docs/configuration-v3_*.md).
func parseMachineConfig(data []byte) (map[string]bool, error) {
	var mc struct {
		Kind string
		Spec struct {
			Config *struct {
				Ignition struct{ Version string }
				Storage  struct {
					Files, Links []struct{ Path string }
				}
				Systemd struct {
					Units []struct {
						Name    string
						Dropins []struct{ Name string }
					}
				}
			}
		}
	}
	if err := json.Unmarshal(data, &mc); err != nil {
		return nil, err
	}
	if mc.Kind != "MachineConfig" || mc.Spec.Config == nil || mc.Spec.Config.Ignition.Version == "" {
		return nil, errors.New("it holds no MachineConfig with an Ignition config")
	}
	files := map[string]bool{}
	for _, f := range append(mc.Spec.Config.Storage.Files, mc.Spec.Config.Storage.Links...) {
		files[path.Clean("/"+f.Path)] = true
	}
	for _, u := range mc.Spec.Config.Systemd.Units {
		files[path.Join("/etc/systemd/system", u.Name)] = true
		for _, d := range u.Dropins {
			files[path.Join("/etc/systemd/system", u.Name+".d", d.Name)] = true
		}
	}
	return files, nil
}

// mounts notes which mount points can not be written.
func (o *observer) mounts() {
	data, err := o.ReadFile(o.ctx, "/proc/1/mountinfo")
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			o.unseen("what is mounted read-only", err)
		}
		return
	}
	o.facts.ReadOnlyMounts = readOnlyMounts(data)
}

// readOnlyMounts reads proc_pid_mountinfo(5); the last of several mounts on one
// point is the one on top.
func readOnlyMounts(data []byte) map[string]bool {
	mounts := map[string]bool{}
	for line := range bytes.Lines(data) {
		head, _, ok := bytes.Cut(line, []byte(" - "))
		f := bytes.Fields(head)
		if !ok || len(f) < 6 {
			continue
		}
		mounts[string(f[4])] = slices.Contains(strings.Split(string(f[5]), ","), "ro")
	}
	return mounts
}

func (o *observer) modules() {
	lists := []string{"/etc/modules"}
	for _, dir := range []string{"/etc/modules-load.d", "/run/modules-load.d", "/usr/local/lib/modules-load.d", "/usr/lib/modules-load.d", "/lib/modules-load.d"} {
		names, _ := o.ReadDir(o.ctx, dir)
		for _, name := range names {
			if strings.HasSuffix(name, ".conf") {
				lists = append(lists, path.Join(dir, name))
			}
		}
	}
	for _, name := range lists {
		data, _ := o.ReadFile(o.ctx, name)
		for line := range strings.Lines(string(data)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' && line[0] != ';' {
				o.facts.ModulesListed[moduleName(strings.Fields(line)[0])] = true
			}
		}
	}
}

func (o *observer) file(name string) FileFact {
	st, err := o.Lstat(o.ctx, name)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return FileFact{}
	case err != nil:
		return FileFact{Err: err.Error()}
	case st.Mode&fs.ModeSymlink != 0:
		return FileFact{Exists: true, Symlink: true}
	case name == initiatorFile:
		// Its being there is all that matters.
		return FileFact{Exists: true, Mode: st.Mode, UID: st.UID, GID: st.GID}
	}
	data, err := o.ReadFileMax(o.ctx, name, 1<<20)
	if err != nil {
		return FileFact{Exists: true, Err: err.Error()}
	}
	return FileFact{Exists: true, Data: string(data), Mode: st.Mode.Perm(), UID: st.UID, GID: st.GID}
}

// owner resolves "user", "user:group" or numbers by the host's own files.
func (o *observer) owner(text string) {
	user, group, hasGroup := strings.Cut(text, ":")
	var ids [2]uint32
	uid, gid, ok := o.lookup("/etc/passwd", user)
	if !ok {
		return
	}
	ids = [2]uint32{uid, gid}
	if hasGroup {
		if ids[1], _, ok = o.lookup("/etc/group", group); !ok {
			return
		}
	}
	o.facts.Owners[text] = ids
}

// lookup finds a name in passwd(5) or group(5): its number, and in passwd the
// number of its group.
func (o *observer) lookup(file, name string) (id, group uint32, ok bool) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), uint32(n), true
	}
	data, err := o.ReadFile(o.ctx, file)
	if err != nil {
		return 0, 0, false
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 4 || f[0] != name {
			continue
		}
		n, err := strconv.ParseUint(f[2], 10, 32)
		g, _ := strconv.ParseUint(f[3], 10, 32)
		return uint32(n), uint32(g), err == nil
	}
	return 0, 0, false
}
