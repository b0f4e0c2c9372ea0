package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/engine"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/remedy"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/pkg/terminal"
)

func newCheck(c *common) *cobra.Command {
	var output string
	var watch bool
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Make one pass over this host and show what is wrong",
		Long: `check makes one pass over this host, without any cluster.

Exit codes: 0 nothing is wrong; 1 a warning or critical finding; 2 the command
line or the config is wrong; 3 no finding, but a probe could not run.`,
		Example: `  agent check -o wide                # all evidence, and what each took
  agent check --watch --every 30s    # again and again
  agent check -o junit >hygiene.xml  # for a pipeline
  agent check --root /mnt/image      # a tree that is not running`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(checkOutputs, output) {
				return exitError{exitUsage, fmt.Errorf("-o %s: want table, wide, json, yaml or junit", output)}
			}
			if watch && output == "junit" {
				return exitError{exitUsage, errors.New("--watch: a JUnit file holds one pass")}
			}
			if every <= 0 {
				return exitError{exitUsage, fmt.Errorf("--every %s: want more than 0", every)}
			}
			cfg, err := c.load()
			if err != nil {
				return err
			}
			view, closeView, err := c.open()
			if err != nil {
				return err
			}
			defer closeView()
			w, p := cmd.OutOrStdout(), progress(cmd, output)
			if watch {
				return c.watch(cmd.Context(), w, p, every, output, func(ctx context.Context) (report.HostReport, error) {
					return c.pass(ctx, view, cfg, p)
				})
			}
			r, err := c.pass(cmd.Context(), view, cfg, p)
			if err != nil {
				return err
			}
			if err := c.show(w, terminal.LookOf(w), r, output); err != nil {
				return exitError{exitFinding, err}
			}
			return exitError{r.ExitCode(), nil}
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table, wide, json, yaml or junit")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "check again and again until interrupted")
	cmd.Flags().DurationVar(&every, "every", 10*time.Second, "how long to wait between passes, with --watch")
	complete(cmd, "output", checkOutputs)
	return cmd
}

var checkOutputs = []string{"table", "wide", "json", "yaml", "junit"}

// complete lets a shell offer the values of a flag.
func complete(cmd *cobra.Command, flag string, values []string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// progress is for output that a person reads.
func progress(cmd *cobra.Command, output string) *terminal.Progress {
	if !slices.Contains([]string{"table", "wide", "text"}, output) {
		return nil
	}
	return terminal.NewProgress(cmd.OutOrStdout(), cmd.ErrOrStderr())
}

// watch shows pass after pass, on a terminal each in the place of the one before.
// Being interrupted is how it ends.
func (c *common) watch(ctx context.Context, w io.Writer, p *terminal.Progress, every time.Duration, output string, pass func(context.Context) (report.HostReport, error)) error {
	for {
		r, err := pass(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		var b strings.Builder
		at := time.Now()
		redraw := terminal.Is(w)
		switch {
		case output == "yaml":
			b.WriteString("---\n")
		case output == "json":
		case redraw:
			fmt.Fprintf(&b, "%s  %s  (every %s, Ctrl-C ends it)\n", at.Format(time.TimeOnly), inBrief(r), every)
		default:
			fmt.Fprintln(&b, at.UTC().Format(time.RFC3339))
		}
		if err := c.show(&b, terminal.LookOf(w), r, output); err != nil {
			return exitError{exitFinding, err}
		}
		if redraw {
			err = terminal.Redraw(w, b.String())
		} else {
			_, err = fmt.Fprintln(w, b.String())
		}
		if err != nil {
			return exitError{exitFinding, err}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// load reads the config; what is wrong with it is a usage error.
func (c *common) load() (*config.Sections, error) {
	if c.config == "" {
		return &config.Default().Sections, nil
	}
	file, err := config.Load(c.config)
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	// Without a cluster there are no labels to select overrides by.
	cfg, err := file.ForNode(nil)
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	return &cfg.Sections, nil
}

// open opens this host, or the tree of --root.
func (c *common) open() (host.View, func(), error) {
	if c.root != "" {
		tree, err := host.OpenTree(c.root)
		if err != nil {
			return nil, nil, exitError{exitUsage, fmt.Errorf("--root: %w", err)}
		}
		return tree, func() { tree.Close() }, nil
	}
	h, err := host.Open(host.Options{Observe: c.observe})
	if err != nil {
		return nil, nil, exitError{exitUnknown, err}
	}
	return h, func() { h.Close() }, nil
}

// inBrief names the probes that do not say that all is well, for the first line of
// a table that may have no room.
func inBrief(r report.HostReport) string {
	var wrong, unknown []string
	for _, p := range r.Probes {
		switch p.Status {
		case finding.Problem:
			wrong = append(wrong, p.Name)
		case finding.Unknown:
			unknown = append(unknown, p.Name)
		}
	}
	var out []string
	if len(wrong) > 0 {
		out = append(out, "Problem: "+strings.Join(wrong, " "))
	}
	if len(unknown) > 0 {
		out = append(out, "Unknown: "+strings.Join(unknown, " "))
	}
	return cmp.Or(strings.Join(out, "; "), "nothing is wrong")
}

// errInterrupted: what a pass says that was given up is of no worth.
var errInterrupted = exitError{exitUnknown, errors.New("interrupted")}

// pass makes one pass. The error is that of having been interrupted.
func (c *common) pass(ctx context.Context, view host.View, cfg *config.Sections, p *terminal.Progress) (report.HostReport, error) {
	o, err := view.OS(ctx)
	if err != nil {
		o = host.OS{ID: "unknown"}
	}
	reports, err := once(ctx, view, cfg, p)
	defer p.Done()
	if err != nil {
		return report.HostReport{}, err
	}
	if !c.observe {
		if err := remedy.Annotate(ctx, view, reports); err != nil {
			p.Done()
			fmt.Fprintln(os.Stderr, "what the agent did before:", report.Lines(err.Error()))
		}
	}
	return report.NewHostReport(c.nodeName(ctx, view), version, o, time.Now(), reports), nil
}

// once is [engine.Once] for somebody who waits for it.
func once(ctx context.Context, view host.View, cfg *config.Sections, p *terminal.Progress) ([]finding.Report, error) {
	var u engine.Underway
	p.Follow(func() string { return "waiting for " + u.Left() })
	reports := engine.Once(ctx, view, cfg, &u)
	if ctx.Err() != nil {
		p.Done()
		return nil, errInterrupted
	}
	return reports, nil
}

func (c *common) nodeName(ctx context.Context, view host.View) string {
	if name := os.Getenv("NODE_NAME"); name != "" {
		return name
	}
	if data, err := view.ReadFile(ctx, "/proc/sys/kernel/hostname"); err == nil {
		return strings.TrimSpace(string(data))
	}
	if data, err := view.ReadFile(ctx, "/etc/hostname"); err == nil {
		return strings.TrimSpace(string(data))
	}
	return "localhost"
}

func (c *common) show(w io.Writer, look terminal.Look, r report.HostReport, output string) error {
	switch output {
	case "json":
		return report.WriteJSON(w, r)
	case "yaml":
		return report.WriteYAML(w, r)
	case "junit":
		return r.WriteJUnit(w)
	}
	style := report.Style{Look: look, Wide: output == "wide"}
	if err := r.WriteTable(w, style); err != nil {
		return err
	}
	if os.Geteuid() != 0 && c.root == "" {
		_, err := fmt.Fprintln(w, "\nNot run as root: some things could not be seen. sudo would help.")
		return err
	}
	return nil
}

// explanation is what explain shows, and what the running agent answers.
type explanation struct {
	Report   report.HostReport `json:"report"`
	Settings json.RawMessage   `json:"settings"`
	From     string            `json:"from"`
	// Details is what the probe can show besides, DetailsError what of that it
	// could not.
	Details      []probes.Table `json:"details,omitempty"`
	DetailsError string         `json:"detailsError,omitempty"`
}

// explainLimit bounds what explain reads besides a pass.
const explainLimit = 20 * time.Second

// detail lets the probe show what it has besides its findings.
func (e *explanation) detail(ctx context.Context, view host.View, cfg *config.Sections, name string) {
	i := slices.IndexFunc(cfg.Probes.List(), func(p probes.Probe) bool { return p.Name() == name })
	if i < 0 {
		return
	}
	p, ok := cfg.Probes.List()[i].(probes.Explainer)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, explainLimit)
	defer cancel()
	var err error
	e.Details, err = p.Explain(ctx, probes.Input{Host: view, Now: time.Now(), Require: cfg.Require, Memory: probes.NewMemory()})
	if err != nil {
		e.DetailsError = err.Error()
	}
}

func newExplain(c *common) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "explain PROBE",
		Short: "Show one probe with all its evidence and the settings in force",
		Long: `explain shows one probe with all its evidence and the settings in force. Where
an agent runs on this host it is asked, so that what it remembers is shown too;
otherwise one pass is made.`,
		Example: `  agent explain time    # every clock and source
  agent explain oom     # the kernel's kill order, and what the kubelet intended`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return probeNames(), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if !slices.Contains(probeNames(), name) {
				return exitError{exitUsage, fmt.Errorf("no probe %q: want one of %s", name, strings.Join(probeNames(), ", "))}
			}
			if output != "text" && output != "json" {
				return exitError{exitUsage, fmt.Errorf("-o %s: want text or json", output)}
			}
			var e explanation
			var err error
			p := progress(cmd, output)
			defer p.Done()
			if c.root == "" && c.config == "" {
				p.Say("asking the agent that runs here")
				e, err = askAgent(cmd.Context(), name)
			}
			if c.root != "" || c.config != "" || err != nil {
				if e, err = c.explainHere(cmd.Context(), name, p); err != nil {
					return err
				}
			}
			p.Done()
			w := cmd.OutOrStdout()
			look := terminal.LookOf(w)
			if output == "json" {
				if err := report.WriteJSON(w, e); err != nil {
					return exitError{exitFinding, err}
				}
				return exitError{e.Report.ExitCode(), nil}
			}
			if err := c.show(w, look, e.Report, "wide"); err != nil {
				return exitError{exitFinding, err}
			}
			if err := report.WriteDetails(w, e.Details, e.DetailsError, report.Style{Look: look}); err != nil {
				return exitError{exitFinding, err}
			}
			settings, err := indentYAML(e.Settings)
			if err != nil {
				return exitError{exitFinding, err}
			}
			fmt.Fprintf(w, "\nsettings in force (%s)\n%s", report.Lines(e.From), settings)
			return exitError{e.Report.ExitCode(), nil}
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	complete(cmd, "output", []string{"text", "json"})
	return cmd
}

func probeNames() []string {
	var names []string
	for _, p := range config.Default().Probes.List() {
		names = append(names, p.Name())
	}
	return names
}

func (c *common) explainHere(ctx context.Context, name string, p *terminal.Progress) (explanation, error) {
	cfg, err := c.load()
	if err != nil {
		return explanation{}, err
	}
	view, closeView, err := c.open()
	if err != nil {
		return explanation{}, err
	}
	defer closeView()
	r, err := c.pass(ctx, view, cfg, p)
	if err != nil {
		return explanation{}, err
	}
	r.Probes = slices.DeleteFunc(r.Probes, func(p report.ProbeReport) bool { return p.Name != name })
	settings, err := settingsOf(cfg, name)
	from := "the defaults"
	if c.config != "" {
		from = c.config
	}
	e := explanation{Report: r, Settings: settings, From: from}
	if err == nil {
		ctx, trace := host.WithTrace(ctx)
		p.Follow(func() string { return "reading what lies behind it: " + trace.Last() })
		e.detail(ctx, view, cfg, name)
	}
	return e, err
}

func settingsOf(cfg *config.Sections, name string) (json.RawMessage, error) {
	for _, p := range cfg.Probes.List() {
		if p.Name() == name {
			return json.Marshal(p)
		}
	}
	return nil, fmt.Errorf("no probe %q", name)
}

// agentSocket is where a running agent answers explain, on the host's own path.
const agentSocket = "/var/lib/host-hygiene/agent.sock"

func askAgent(ctx context.Context, probe string) (explanation, error) {
	var e explanation
	ctx, cancel := context.WithTimeout(ctx, explainLimit+10*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", agentSocket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/explain/"+probe, nil)
	if err != nil {
		return e, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return e, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return e, fmt.Errorf("the agent answers %s", resp.Status)
	}
	return e, json.NewDecoder(io.LimitReader(resp.Body, 16<<20)).Decode(&e)
}

func newValidate() *cobra.Command {
	return &cobra.Command{
		Use:     "validate FILE...",
		Short:   "Say what is wrong with config files, each mistake with its line",
		Example: "  agent validate config.yaml configmap.yaml",
		Args:    cobra.MinimumNArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"yaml", "yml"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(cmd *cobra.Command, files []string) error {
			var errs []error
			for _, file := range files {
				if _, err := config.Load(file); err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: valid\n", file)
			}
			if len(errs) > 0 {
				for _, err := range errs {
					fmt.Fprintln(cmd.ErrOrStderr(), report.Lines(err.Error()))
				}
				return exitError{exitUsage, nil}
			}
			return nil
		},
	}
}

var errNoNode = errors.New("no node name: set NODE_NAME or give --node-name")
