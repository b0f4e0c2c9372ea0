package remedy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// Rollback takes back the last plan that was applied, or all of them, newest
// first. It returns what was put back and what stays, in words: packages and
// loaded modules stay, because volumes may use them by now.
func (a *Applier) Rollback(ctx context.Context, all bool) (undone, stays []string, err error) {
	records, err := readRecords(ctx, a.View)
	if err != nil {
		return nil, nil, err
	}
	for _, rec := range slices.Backward(records) {
		if !rec.RolledBack.IsZero() {
			continue
		}
		st := &store{Changer: a.Changer, record: rec}
		did := false
		for i := range slices.Backward(st.record.Results) {
			r := &run{Applier: a, store: st, index: i}
			res := r.result()
			was := slices.Clone(res.Changes)
			if !slices.ContainsFunc(was, func(c Change) bool { return !c.Undone }) {
				continue // nothing was changed, or it was taken back when it failed
			}
			did = true
			stays = append(stays, r.undo(ctx, res.Changes)...)
			for i, c := range res.Changes {
				if c.Undone && !was[i].Undone && c.What != "directory" {
					undone = append(undone, c.undoneText())
				}
			}
			if res.Outcome != Failed {
				res.Outcome = RolledBack
			}
			res.Message = "taken back by agent rollback"
			a.audit(ctx, *res)
		}
		st.record.RolledBack = time.Now().UTC()
		if err := st.save(ctx); err != nil {
			return undone, stays, err
		}
		if did && !all {
			break
		}
	}
	return undone, stays, nil
}

func (c Change) undoneText() string {
	switch {
	case c.What == "file" && c.Existed:
		return c.Name + " is what it was before"
	case c.What == "file":
		return c.Name + " is gone"
	case c.What == "unit":
		return c.Name + " is " + map[string]string{"enable": "disabled", "start": "stopped", "unmask": "masked"}[c.Do] + " again"
	}
	return c.Name + " is " + c.Before + " again"
}

// undo puts changes back, last first, and marks them; it returns in words what
// stays. Files are put back first, so that services reload what was.
func (r *run) undo(ctx context.Context, changes []Change) (stays []string) {
	daemonReload, multipath := false, false
	for i := range slices.Backward(changes) {
		c := &changes[i]
		if c.Undone {
			continue
		}
		why, err := r.undoOne(ctx, c)
		switch {
		case err != nil:
			stays = append(stays, fmt.Sprintf("%s %s: %v", c.What, c.Name, err))
		case why != "":
			stays = append(stays, why)
		default:
			c.Undone = true
			daemonReload = daemonReload || c.What == "file" && strings.HasPrefix(c.Name, "/etc/systemd/")
			multipath = multipath || c.What == "file" && isMultipathConfig(c.Name)
		}
	}
	if daemonReload {
		if err := r.Changer.ReloadSystemd(ctx); err != nil && !errors.Is(err, host.ErrNoSystemd) {
			stays = append(stays, fmt.Sprintf("systemd has not read its units anew: %v", err))
		}
	}
	if multipath {
		if err := r.reloadMultipath(ctx); err != nil {
			stays = append(stays, fmt.Sprintf("multipathd has not read its configuration anew: %v", err))
		}
	}
	return stays
}

func (r *run) reloadMultipath(ctx context.Context) error {
	units, err := r.View.Units(ctx, "multipathd.service")
	if errors.Is(err, host.ErrNoSystemd) || errors.Is(err, host.ErrNotLive) {
		return nil
	}
	if err != nil || units[0].Active != "active" {
		return err
	}
	return r.Changer.ReloadUnit(ctx, "multipathd.service")
}

// keepsRunning are daemons that volumes may depend on by now: they are not
// stopped (a stopped multipathd also ends queueing on its maps).
var keepsRunning = []string{"multipathd.service", "iscsid.service", "iscsid.socket", "multipathd.socket"}

// undoOne puts one change back. why says in words what stays on purpose.
func (r *run) undoOne(ctx context.Context, c *Change) (why string, err error) {
	switch c.What {
	case "file":
		return r.undoFile(ctx, c)
	case "directory":
		err := r.Changer.RemoveDir(ctx, c.Name)
		if err != nil {
			return "the directory " + c.Name + " stays, for it is not empty", nil
		}
		return "", nil
	case "unit":
		switch {
		case c.Do == "enable":
			return "", r.Changer.DisableUnit(ctx, c.Name)
		case c.Do == "unmask":
			return "", r.Changer.MaskUnit(ctx, c.Name)
		case slices.Contains(keepsRunning, c.Name):
			return c.Name + " goes on running, for volumes may use it", nil
		}
		return "", r.Changer.StopUnit(ctx, c.Name)
	case "sysctl":
		data, err := r.View.ReadFile(ctx, host.SysctlPath(c.Name))
		if err != nil {
			return "", err
		}
		if now := strings.Join(strings.Fields(string(data)), " "); now != strings.Join(strings.Fields(c.After), " ") {
			return fmt.Sprintf("%s stays %s, which is not what the agent set", c.Name, now), nil
		}
		_, err = r.Changer.SetSysctl(ctx, c.Name, c.Before)
		return "", err
	case "score":
		var before int
		if _, err := fmt.Sscan(c.Before, &before); err != nil {
			return "", err
		}
		_, err := r.Changer.SetOOMScore(ctx, c.PID, c.Start, before)
		if errors.Is(err, host.ErrOtherProcess) {
			return "", nil
		}
		return "", err
	case "packages":
		return fmt.Sprintf("the packages %s stay, for volumes may use them; a person removes them with: %s", strings.Join(c.Packages, " "), c.Hint), nil
	case "module":
		return "the module " + c.Name + " stays loaded until the next boot", nil
	}
	return fmt.Sprintf("%s %s: nobody knows how to undo it", c.What, c.Name), nil
}

func (r *run) undoFile(ctx context.Context, c *Change) (why string, err error) {
	now, err := r.Changer.Snapshot(ctx, c.Name)
	absent := errors.Is(err, fs.ErrNotExist)
	if err != nil && !absent {
		return "", err
	}
	switch {
	case !absent && hash(now.Data) != c.SHA256 && !r.isBackup(ctx, c, now.Data):
		return c.Name + " stays, for somebody has changed it since", nil
	case c.Name == initiatorFile:
		return c.Name + " stays, for arrays may know this node by it", nil
	case absent && c.Existed:
		return c.Name + " stays away, for somebody has removed it since; what it was is in " + c.Backup, nil
	case !c.Existed:
		return "", r.Changer.RemoveFile(ctx, c.Name)
	}
	data, err := r.View.ReadFile(ctx, c.Backup)
	if err != nil {
		return "", fmt.Errorf("what it was before: %w", err)
	}
	return "", r.Changer.WriteFile(ctx, c.Name, host.FileContent{Data: data, Mode: fs.FileMode(c.Mode), UID: c.UID, GID: c.GID, Label: c.Label})
}

// isBackup tells that the file is what it was before: the agent was killed
// between its record and the change.
func (r *run) isBackup(ctx context.Context, c *Change, data []byte) bool {
	if !c.Existed || path.Dir(c.Backup) == "." {
		return false
	}
	old, err := r.View.ReadFile(ctx, c.Backup)
	return err == nil && hash(old) == hash(data)
}
