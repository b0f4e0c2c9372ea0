package report

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/engine"
)

// minValid is for how long a feature file is good at least, and no more than a
// dead agent's word should be.
const minValid = 15 * time.Minute

// Features tells node-feature-discovery what the conditions say, as a file that
// its worker makes labels of this Node from: each condition's type with its
// status for a value. The worker takes no notice of a file whose expiry time has
// passed, so the labels of a node whose agent is dead go by themselves
// (https://kubernetes-sigs.github.io/node-feature-discovery/stable/usage/customization-guide.html#local-feature-source).
type Features struct {
	path string
	log  *slog.Logger
	// latest holds the newest snapshot until Run takes it.
	latest chan engine.Snapshot
}

// NewFeatures tells by the file at path.
func NewFeatures(path string, log *slog.Logger) *Features {
	return &Features{path: path, log: log, latest: make(chan engine.Snapshot, 1)}
}

// Report implements [engine.Reporter].
func (f *Features) Report(s engine.Snapshot) {
	select {
	case <-f.latest:
	default:
	}
	f.latest <- s // the engine's loop is the only one that sends
}

// Run writes the file until ctx ends: when a label changes, and in time before it
// expires. Every write wakes the worker, so there are no others. The file is left
// behind, for the next agent to go on with or to expire.
func (f *Features) Run(ctx context.Context) {
	var labels string
	var renewAt time.Time
	failing := false
	for {
		var s engine.Snapshot
		select {
		case <-ctx.Done():
			return
		case s = <-f.latest:
		}
		now := time.Now()
		var err error
		switch is := featureLabels(s); {
		case !bool(s.Config.Report.Conditions):
			err = os.Remove(f.path)
			if os.IsNotExist(err) {
				err = nil
			}
			labels = ""
		case s.Quiet != "" || !s.Complete: // what the last one said still holds, or expires
			continue
		case is == labels && now.Before(renewAt):
			continue
		default:
			valid := max(minValid, 3*s.Config.Interval.D())
			if err = f.write(fmt.Sprintf("# +expiry-time=%s\n%s", now.Add(valid).UTC().Format(time.RFC3339), is)); err == nil {
				labels, renewAt = is, now.Add(valid/3)
			}
		}
		if err != nil && !failing {
			f.log.Warn("node-feature-discovery is not told what was found", "error", err)
		}
		failing = err != nil
	}
}

// featureLabels is a line for each condition.
func featureLabels(s engine.Snapshot) string {
	var b strings.Builder
	for _, c := range Conditions(s) {
		fmt.Fprintf(&b, "%s=%s\n", c.Type, c.Status)
	}
	return b.String()
}

// write replaces the file at once; the worker takes no notice of names that begin
// with a dot.
func (f *Features) write(text string) error {
	dir, name := filepath.Split(f.path)
	temporary := filepath.Join(dir, "."+name)
	if err := os.Remove(temporary); err != nil && !os.IsNotExist(err) {
		return err
	}
	w, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fs.FileMode(0o644))
	if err != nil {
		return err
	}
	_, err = w.WriteString(text)
	if closeErr := w.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return os.Rename(temporary, f.path)
}
