package watch

import (
	"maps"
	"slices"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// subjects are what a source may tell of, with the probes that wakes.
type subjects map[string][]string

// whatever stands for all a source tells.
const whatever = "*"

func (s *subjects) add(probe string, what ...string) {
	if *s == nil {
		*s = subjects{}
	}
	for _, w := range what {
		if !slices.Contains((*s)[w], probe) {
			(*s)[w] = append((*s)[w], probe)
		}
	}
}

func (s subjects) names() []string { return slices.Sorted(maps.Keys(s)) }

// wakes are the probes that something wakes.
func (s subjects) wakes(what string) []string {
	if probes, ok := s[what]; ok {
		return probes
	}
	return s[whatever]
}

// probes are all that any of it wakes.
func (s subjects) probes() []string {
	var all []string
	for _, probes := range s {
		all = append(all, probes...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// plan is what the probes that are on want to hear of.
type plan struct {
	all        []string
	units      subjects
	processes  subjects
	mounts     subjects
	subsystems subjects
	iscsi      subjects
	kernelLog  subjects
	clock      subjects
	files      subjects
	list       []host.FollowedFile // the files, with what counts of each
	after      map[string]time.Duration
	again      map[string]time.Duration
}

// without says which sources the host does not have, so that others stand in.
type without struct{ systemd, kernelLog bool }

func newPlan(on []probes.Probe, require probes.Require, follow map[string][]string, not without) *plan {
	p := &plan{after: map[string]time.Duration{}, again: map[string]time.Duration{}}
	for _, probe := range on {
		name, w := probe.Name(), probe.Wakes(require)
		p.all = append(p.all, name)
		p.units.add(name, w.Units...)
		if w.UnitFiles {
			p.units.add(name, host.UnitFiles)
		}
		if not.systemd {
			p.processes.add(name, w.Processes...)
		}
		if w.Mounts {
			p.mounts.add(name, whatever)
		}
		p.subsystems.add(name, w.Subsystems...)
		if w.ISCSI {
			p.iscsi.add(name, whatever)
		}
		if w.Clock {
			p.clock.add(name, whatever)
		}
		p.kernelLog.add(name, w.KernelLog...)
		p.addFiles(name, w.Files)
		if not.kernelLog {
			p.addFiles(name, w.WithoutKernelLog)
		}
		for _, f := range follow[name] {
			p.addFiles(name, []host.FollowedFile{{Name: f}})
		}
		p.after[name], p.again[name] = w.After, w.Again
	}
	return p
}

func (p *plan) addFiles(probe string, files []host.FollowedFile) {
	for _, f := range files {
		p.files.add(probe, f.Name)
		if !slices.Contains(p.list, f) {
			p.list = append(p.list, f)
		}
	}
}
