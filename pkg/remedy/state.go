package remedy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// StateDir holds what the agent has done to a host, and how to undo it:
//
//	plans/20261121T230000Z-1a2b3c4d5e6f/record.json
//	plans/20261121T230000Z-1a2b3c4d5e6f/backup-1
const (
	StateDir  = "/var/lib/host-hygiene"
	plansDir  = StateDir + "/plans"
	stampForm = "20060102T150405Z"
)

// Outcome is what became of a step.
type Outcome string

// The outcomes. Only the next check makes Applied Confirmed or Failed.
const (
	// Started: its changes may have been made; what came of it is not known yet.
	Started Outcome = "started"
	// Applied: everything was done; whether it helps the next check says.
	Applied Outcome = "applied"
	// Staged: done, and without effect before a reboot.
	Staged     Outcome = "staged"
	Confirmed  Outcome = "confirmed"
	Failed     Outcome = "failed"
	RolledBack Outcome = "rolled-back"
	// Skipped: not begun, because of what it depends on or the time.
	Skipped Outcome = "skipped"
)

// Result is what became of one step.
type Result struct {
	Step     string   `json:"step"`
	Digest   string   `json:"digest"`
	Kind     string   `json:"kind"`
	Actions  []string `json:"actions"`
	Subjects []string `json:"subjects"`
	Why      []Why    `json:"why"`
	Outcome  Outcome  `json:"outcome"`
	// Message is one sentence; Output the last lines of the program that failed.
	Message string    `json:"message,omitempty"`
	Output  []string  `json:"output,omitempty"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	BootID  string    `json:"bootID,omitempty"`
	// Changes are in the order they were made; each is on record before it is.
	Changes []Change `json:"changes,omitempty"`
}

// Change is one thing that was changed and can be put back.
type Change struct {
	// What is file, directory, unit, sysctl, score, packages or module.
	What string `json:"what"`
	// Name of the file, unit, setting or module.
	Name string `json:"name"`
	// Do is what was done to a unit.
	Do string `json:"do,omitempty"`
	// Before and After are a setting's or score's values.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	// Of a file: whether it was there, where it is kept, with what, and the
	// SHA-256 of what was written.
	Existed bool   `json:"existed,omitempty"`
	Backup  string `json:"backup,omitempty"`
	Mode    uint32 `json:"mode,omitempty"`
	UID     uint32 `json:"uid,omitempty"`
	GID     uint32 `json:"gid,omitempty"`
	Label   string `json:"label,omitempty"`
	SHA256  string `json:"sha256,omitempty"`
	// Of a score: whose it was.
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"`
	// Packages that came, and how a person removes them.
	Packages []string `json:"packages,omitempty"`
	Hint     string   `json:"hint,omitempty"`
	// Undone: it has been put back.
	Undone bool `json:"undone,omitempty"`
}

// Record is one plan as it was carried out.
type Record struct {
	// Dir is its folder.
	Dir     string    `json:"-"`
	ID      string    `json:"id"`
	Began   time.Time `json:"began"`
	Results []Result  `json:"results"`
	// RolledBack is when a person took it back.
	RolledBack time.Time `json:"rolledBack,omitzero"`
}

// Left is something the agent has left on the host.
type Left struct {
	What string    `json:"what"`
	Name string    `json:"name"`
	Text string    `json:"text"`
	At   time.Time `json:"at"`
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// maxRecords bounds what is read; a plan is carried out when something is wrong,
// not every minute.
const maxRecords = 200

// readRecords reads the state, oldest first. One that can not be read is an
// error beside the others.
func readRecords(ctx context.Context, files host.Files) ([]Record, error) {
	names, err := files.ReadDir(ctx, plansDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	names = names[max(0, len(names)-maxRecords):]
	var records []Record
	var errs []error
	for _, name := range names {
		dir := path.Join(plansDir, name)
		data, err := files.ReadFile(ctx, path.Join(dir, "record.json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // killed before it began
		}
		r := Record{Dir: dir}
		if err == nil {
			if err = json.Unmarshal(data, &r); err != nil {
				err = fmt.Errorf("%s/record.json: %w", dir, err)
			}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		records = append(records, r)
	}
	return records, errors.Join(errs...)
}

func pastOf(records []Record) []Result {
	var past []Result
	for _, r := range records {
		if r.RolledBack.IsZero() {
			past = append(past, r.Results...)
		}
	}
	return past
}

// leftOf lists what is still there of what was done.
func leftOf(ctx context.Context, files host.Files, records []Record) []Left {
	var left []Left
	seen := map[string]bool{}
	for _, r := range slices.Backward(records) {
		for _, res := range slices.Backward(r.Results) {
			for _, c := range slices.Backward(res.Changes) {
				key := c.What + " " + c.Name + " " + c.Do
				if c.Undone || seen[key] {
					continue
				}
				if text := c.left(ctx, files); text != "" {
					seen[key] = true
					left = append(left, Left{c.What, c.Name, text, res.Started})
				}
			}
		}
	}
	slices.Reverse(left)
	return left
}

// left says in words what is there of a change, "" when nothing is.
func (c Change) left(ctx context.Context, files host.Files) string {
	switch c.What {
	case "file":
		data, err := files.ReadFileMax(ctx, c.Name, 1<<20)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return ""
		case err != nil:
			return "a file the agent wrote; it can not be read now"
		case hash(data) != c.SHA256:
			return "a file the agent wrote and somebody has changed since"
		case c.Existed:
			return "a file the agent changed; what it was before is kept"
		}
		return "a file the agent made"
	case "directory":
		if _, err := files.Lstat(ctx, c.Name); err != nil {
			return ""
		}
		return "a directory the agent made"
	case "unit":
		return map[string]string{"enable": "enabled at boot", "start": "started", "unmask": "unmasked"}[c.Do]
	case "sysctl":
		return fmt.Sprintf("set to %s, was %s", c.After, c.Before)
	case "score":
		if _, err := files.Lstat(ctx, fmt.Sprintf("/proc/%d", c.PID)); err != nil {
			return ""
		}
		return fmt.Sprintf("oom_score_adj of its process %d set to %s, was %s", c.PID, c.After, c.Before)
	case "packages":
		return "installed " + strings.Join(c.Packages, " ")
	case "module":
		if _, err := files.Lstat(ctx, "/sys/module/"+moduleName(c.Name)); err != nil {
			return ""
		}
		return "loaded until the next boot"
	}
	return ""
}

// store writes a record, whole each time.
type store struct {
	Changer
	record Record
	// backups counts those of the record.
	backups int
}

func openStore(ctx context.Context, c Changer, id string, now time.Time) (*store, error) {
	s := &store{Changer: c, record: Record{ID: id, Began: now.UTC()}}
	s.record.Dir = path.Join(plansDir, now.UTC().Format(stampForm)+"-"+id)
	// Backups may hold what not everybody may read.
	if _, err := c.MakeDirs(ctx, s.record.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("the agent's state on the host: %w", err)
	}
	return s, s.save(ctx)
}

func (s *store) save(ctx context.Context) error {
	data, err := json.MarshalIndent(s.record, "", " ")
	if err != nil {
		return err
	}
	if err := s.WriteFile(ctx, path.Join(s.record.Dir, "record.json"), host.FileContent{Data: append(data, '\n'), Mode: 0o600}); err != nil {
		return fmt.Errorf("the agent's record of what it does: %w", err)
	}
	return nil
}

// backup keeps a file's content and returns where.
func (s *store) backup(ctx context.Context, f host.FileContent) (string, error) {
	s.backups++
	name := path.Join(s.record.Dir, fmt.Sprintf("backup-%d", s.backups))
	return name, s.WriteFile(ctx, name, host.FileContent{Data: f.Data, Mode: 0o600})
}

// stillThere tells whether a finding a step was to cure is still there.
func stillThere(why []Why, reports []finding.Report) (Why, bool) {
	for _, w := range why {
		for _, r := range reports {
			if r.Probe != w.Probe {
				continue
			}
			for _, f := range r.Findings {
				if f.Reason == w.Reason && f.Subject == w.Subject {
					return Why{w.Probe, w.Reason, w.Subject, f.Message}, true
				}
			}
		}
	}
	return Why{}, false
}
