package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/terminal"
)

func newPlan(c *common) *cobra.Command {
	var output string
	var simulate bool
	var allow []string
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what remedies would change on this host, and change nothing",
		Long: `plan makes one pass over this host and shows what remedies would do about what
is wrong: every command, a diff of every file, every unit, and why. What the
agent has left on the host by earlier repairs is listed too.

Nothing is written. What only the package manager can tell is marked "not
simulated"; --simulate has it make its own dry run.`,
		Example: `  agent plan --config c.yaml --simulate
  agent plan --config c.yaml --allow packages   # whatever the config says`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"text", "json", "yaml"}, output) {
				return exitError{exitUsage, fmt.Errorf("-o %s: want text, json or yaml", output)}
			}
			cfg, err := c.loadAllowing(allow)
			if err != nil {
				return err
			}
			view, closeView, err := c.open()
			if err != nil {
				return err
			}
			defer closeView()
			p := progress(cmd, output)
			defer p.Done()
			plan, _, err := makePlan(cmd.Context(), view, cfg, p)
			if err != nil {
				return err
			}
			if simulate {
				for i := range plan.Steps {
					s := &plan.Steps[i]
					if s.Refused != "" {
						continue
					}
					p.Say("the package manager's dry run of %s", s.ID)
					if err := s.Simulate(cmd.Context(), view); err != nil {
						s.Refused = "the dry run failed: " + err.Error()
					}
				}
			}
			p.Done()
			w := cmd.OutOrStdout()
			switch output {
			case "json":
				err = report.WriteJSON(w, plan)
			case "yaml":
				err = report.WriteYAML(w, plan)
			default:
				err = plan.WriteText(w, terminal.LookOf(w))
			}
			if err != nil {
				return exitError{exitFinding, err}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text, json or yaml")
	complete(cmd, "output", []string{"text", "json", "yaml"})
	cmd.Flags().BoolVar(&simulate, "simulate", false, "have the package manager make its own dry run")
	allowFlag(cmd, &allow)
	return cmd
}

func allowFlag(cmd *cobra.Command, allow *[]string) {
	cmd.Flags().StringSliceVar(allow, "allow", nil, "`kinds` of things that may be changed, in place of the config's remedies.allow: "+strings.Join(finding.Kinds(), ", "))
	complete(cmd, "allow", finding.Kinds())
}

// loadAllowing reads the config; allow replaces what it lets remedies change.
func (c *common) loadAllowing(allow []string) (*config.Sections, error) {
	for _, kind := range allow {
		if !slices.Contains(finding.Kinds(), kind) {
			return nil, exitError{exitUsage, fmt.Errorf("--allow %s: want some of %s", kind, strings.Join(finding.Kinds(), ", "))}
		}
	}
	cfg, err := c.load()
	if err != nil {
		return nil, err
	}
	if len(allow) > 0 {
		own := *cfg
		own.Remedies.Allow = allow
		cfg = &own
	}
	return cfg, nil
}

func makePlan(ctx context.Context, view host.View, cfg *config.Sections, p *terminal.Progress) (remedy.Plan, remedy.Facts, error) {
	reports, err := once(ctx, view, cfg, p)
	if err != nil {
		return remedy.Plan{}, remedy.Facts{}, err
	}
	ctx, trace := host.WithTrace(ctx)
	p.Follow(func() string { return "looking at what repairs would change: " + trace.Last() })
	facts, err := remedy.Observe(ctx, view, cfg.Require, reports)
	if err != nil {
		return remedy.Plan{}, facts, exitError{exitUnknown, err}
	}
	return remedy.New(remedy.Input{Reports: reports, Require: cfg.Require, Remedies: cfg.Remedies, Facts: facts, Now: time.Now()}), facts, nil
}

// changer opens the host for change, for a person who asked for it.
func (c *common) changer(p *terminal.Progress) (host.View, *remedy.Applier, func(), error) {
	if c.root != "" {
		return nil, nil, nil, exitError{exitUsage, fmt.Errorf("--root: only the host this runs on can be changed")}
	}
	if os.Geteuid() != 0 {
		return nil, nil, nil, exitError{exitUsage, fmt.Errorf("only root can change this host")}
	}
	view, closeView, err := c.open()
	if err != nil {
		return nil, nil, nil, err
	}
	ch, err := host.OpenForChange(host.Options{Observe: c.observe})
	if err != nil {
		closeView()
		return nil, nil, nil, exitError{exitUnknown, err}
	}
	a := &remedy.Applier{View: view, Changer: ch, Log: slog.New(slog.NewTextHandler(report.Escape(p.Over(os.Stderr)), nil))}
	return view, a, func() { ch.Close(); closeView() }, nil
}

func newApply(c *common) *cobra.Command {
	var allow []string
	var settle time.Duration
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Do once what plan shows, on this host and outside a cluster",
		Long: `apply does once what plan shows, and then checks whether it has helped: what
has not is taken back where that is possible. The maintenance window and the
limits of a fleet do not hold here. Nothing that remedies.allow or --allow does
not list is changed.

Exit codes: 0 everything that was planned has helped, or waits for a reboot; 1
a step was refused, failed or has not helped; 2 usage or config error.`,
		Example: "  agent apply --config c.yaml --allow units",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := c.loadAllowing(allow)
			if err != nil {
				return err
			}
			p := progress(cmd, "text")
			defer p.Done()
			view, a, closeAll, err := c.changer(p)
			if err != nil {
				return err
			}
			defer closeAll()
			return applyOnce(cmd, view, a, cfg, settle, p)
		},
	}
	allowFlag(cmd, &allow)
	cmd.Flags().DurationVar(&settle, "settle", 30*time.Second, "how long services get to come up before the check that judges")
	return cmd
}

func applyOnce(cmd *cobra.Command, view host.View, a *remedy.Applier, cfg *config.Sections, settle time.Duration, p *terminal.Progress) error {
	ctx, w := cmd.Context(), cmd.OutOrStdout()
	p.Say("finishing what an earlier repair left")
	if err := a.Resume(ctx); err != nil {
		return exitError{exitFinding, err}
	}
	// What an agent did that was killed before it could look.
	reports, err := once(ctx, view, cfg, p)
	if err != nil {
		return err
	}
	if _, err := a.Confirm(ctx, reports); err != nil {
		return exitError{exitFinding, err}
	}
	plan, facts, err := makePlan(ctx, view, cfg, p)
	if err != nil {
		return err
	}
	p.Done()
	if err := plan.WriteText(w, terminal.LookOf(w)); err != nil {
		return exitError{exitFinding, err}
	}
	at := 0
	a.Permit = func(_ context.Context, s remedy.Step, _ time.Duration) (func(bool), error) {
		at++
		p.Say("step %d of %d: %s, for at most %s", at, len(plan.Pending()), s.ID, s.Deadline().Round(time.Minute))
		return func(bool) {}, nil
	}
	record, err := a.Apply(ctx, plan, facts)
	p.Done()
	if record != nil && len(record.Results) > 0 {
		fmt.Fprintln(w)
		if werr := record.WriteText(w, terminal.LookOf(w)); err == nil {
			err = werr
		}
	}
	if err != nil {
		return exitError{exitFinding, err}
	}
	failed := len(plan.Steps) > len(plan.Pending())
	applied := 0
	for _, r := range record.Results {
		switch r.Outcome {
		case remedy.Applied:
			applied++
		case remedy.Failed, remedy.Skipped, remedy.Started:
			failed = true
		}
	}
	if applied > 0 {
		p.Say("waiting for the repairs to help, for at most %s", settle)
		helped, err := confirm(ctx, view, a, cfg, *record, settle)
		p.Done()
		if err != nil {
			return exitError{exitFinding, err}
		}
		fmt.Fprintln(w, "\nChecked again:")
		if err := (remedy.Record{Results: helped}).WriteText(w, terminal.LookOf(w)); err != nil {
			return exitError{exitFinding, err}
		}
		for _, r := range helped {
			failed = failed || r.Outcome != remedy.Confirmed
		}
	}
	if failed {
		return exitError{exitFinding, nil}
	}
	return nil
}

// confirm checks until everything has helped, or services have had their time.
func confirm(ctx context.Context, view host.View, a *remedy.Applier, cfg *config.Sections, record remedy.Record, settle time.Duration) ([]remedy.Result, error) {
	for deadline := time.Now().Add(settle); ; {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(2 * time.Second):
		}
		reports, err := once(ctx, view, cfg, nil)
		if err != nil {
			return nil, err
		}
		if record.Cured(reports) || time.Now().After(deadline) {
			return a.Confirm(ctx, reports)
		}
	}
}

func newRollback(c *common) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Take back the last plan that was applied to this host",
		Long: `rollback puts files, units, kernel settings and OOM scores back to what they
were before the last plan that was applied, or with --all before the first:
what should be done before the agent is uninstalled. What somebody has changed
since is left alone. Packages and loaded modules stay, because volumes may use
them; how to remove them is said.`,
		Example: `  agent rollback          # the last plan
  agent rollback --all    # everything, before an uninstall`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p := progress(cmd, "text")
			defer p.Done()
			_, a, closeAll, err := c.changer(p)
			if err != nil {
				return err
			}
			defer closeAll()
			p.Say("taking back")
			undone, stays, err := a.Rollback(cmd.Context(), all)
			p.Done()
			w := cmd.OutOrStdout()
			for _, u := range undone {
				fmt.Fprintln(w, report.Lines(u))
			}
			for _, s := range stays {
				fmt.Fprintln(w, "not taken back:", report.Lines(s))
			}
			if err == nil && len(undone)+len(stays) == 0 {
				fmt.Fprintln(w, "Nothing to take back.")
			}
			if err != nil {
				return exitError{exitFinding, err}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "take back everything the agent has ever done to this host")
	return cmd
}
