package main

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"strings"
	"testing"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/host"
)

// Where the agent only observes, no command line leads to a repair.
func TestObserveRefusesRepairs(t *testing.T) {
	for _, line := range []string{
		"plan", "plan --simulate", "plan -o json --allow packages", "apply", "apply --allow files,units --config /etc/host-hygiene/config.yaml",
		"rollback", "rollback --all", "resume", "run --node-name n1 --allow-remedies",
	} {
		root := newRoot(true)
		root.SetArgs(strings.Fields(line))
		err := root.Execute()
		if code := exitCode(err); code != exitUsage || !errors.Is(unwrapped(err), errObserves) {
			t.Errorf("agent %s: exit code %d, %v; want a refusal", line, code, err)
		}
	}
	for _, c := range newRoot(true).Commands() {
		if c.Name() == "check" || c.Name() == "explain" {
			if c.DisableFlagParsing || c.Hidden {
				t.Errorf("agent %s is refused too", c.Name())
			}
		}
	}
}

// unwrapped is the error inside an exitError, which shows and does not wrap.
func unwrapped(err error) error {
	var e exitError
	if errors.As(err, &e) {
		return e.err
	}
	return err
}

func TestObserving(t *testing.T) {
	for value, want := range map[string]bool{"": false, "false": false, "0": false, "true": true, "1": true, "TRUE": true} {
		if got, err := observing(value); got != want || err != nil {
			t.Errorf("%q: %t, %v", value, got, err)
		}
	}
	for _, value := range []string{"yes", "on", " true", "truе"} { // the last has a Cyrillic letter
		if got, err := observing(value); got || exitCode(err) != exitUsage {
			t.Errorf("%q: %t, %v: want a usage error, for neither may be guessed", value, got, err)
		}
	}
}

// Under Observe nothing that writes to the host can be had from package host.
func TestObserveHasNoChanger(t *testing.T) {
	c := common{observe: true}
	if _, err := host.OpenForChange(host.Options{Observe: c.observe}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v: want a refusal", err)
	}
}

// What the config asks for and is not done is told, once for each time it is asked.
func TestObserverTells(t *testing.T) {
	var events []string
	var logged bytes.Buffer
	o := &observer{log: slog.New(slog.NewTextHandler(&logged, nil)), tell: func(kind, reason, subject, message string) {
		events = append(events, kind+" "+reason+" "+subject+": "+message)
	}}
	plan, enforce := config.Default().Sections, config.Default().Sections
	plan.Remedies.Mode, enforce.Remedies.Mode = config.ModePlan, config.ModeEnforce
	for _, cfg := range []*config.Sections{&plan, &enforce, &enforce, &plan, &enforce} {
		o.Report(engine.Snapshot{Config: cfg})
	}
	want := "Warning RemediesNotAllowed remedies: remedies.mode is enforce, but this agent only observes: nothing is changed"
	if len(events) != 2 || events[0] != want || events[1] != want {
		t.Errorf("Events %q, want %q twice", events, want)
	}
	if n := strings.Count(logged.String(), "level=ERROR"); n != 2 {
		t.Errorf("%d lines in the log: %s", n, &logged)
	}
}
