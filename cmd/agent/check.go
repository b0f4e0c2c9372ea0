package main

import (
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
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains([]string{"table", "wide", "json", "yaml", "junit"}, output) {
				return exitError{exitUsage, fmt.Errorf("-o %s: want table, wide, json, yaml or junit", output)}
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
			for {
				r := c.pass(cmd.Context(), view, cfg)
				if watch {
					clearScreen(cmd.OutOrStdout())
				}
				if err := c.show(cmd.OutOrStdout(), r, output); err != nil {
					return exitError{exitFinding, err}
				}
				if !watch {
					return exitError{r.ExitCode(), nil}
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(every):
				}
			}
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table, wide, json, yaml or junit")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "check again and again until interrupted")
	cmd.Flags().DurationVar(&every, "every", 10*time.Second, "how often, with --watch")
	return cmd
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

func (c *common) pass(ctx context.Context, view host.View, cfg *config.Sections) report.HostReport {
	o, err := view.OS(ctx)
	if err != nil {
		o = host.OS{ID: "unknown"}
	}
	reports := engine.Once(ctx, view, cfg)
	if !c.observe {
		if err := remedy.Annotate(ctx, view, reports); err != nil {
			fmt.Fprintln(os.Stderr, "what the agent did before:", report.Lines(err.Error()))
		}
	}
	return report.NewHostReport(c.nodeName(ctx, view), version, o, time.Now(), reports)
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

func (c *common) show(w io.Writer, r report.HostReport, output string) error {
	switch output {
	case "json":
		return report.WriteJSON(w, r)
	case "yaml":
		return report.WriteYAML(w, r)
	case "junit":
		return r.WriteJUnit(w)
	}
	style := report.Style{Colour: terminal.Colour(w), Wide: output == "wide"}
	if err := r.WriteTable(w, style); err != nil {
		return err
	}
	if os.Geteuid() != 0 && c.root == "" {
		_, err := fmt.Fprintln(w, "\nNot run as root: some things could not be seen. sudo would help.")
		return err
	}
	return nil
}

func clearScreen(w io.Writer) {
	if terminal.Is(w) {
		fmt.Fprint(w, "\x1b[H\x1b[2J")
	}
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
			if c.root == "" && c.config == "" {
				e, err = askAgent(cmd.Context(), name)
			}
			if c.root != "" || c.config != "" || err != nil {
				if e, err = c.explainHere(cmd.Context(), name); err != nil {
					return err
				}
			}
			w := cmd.OutOrStdout()
			if output == "json" {
				if err := report.WriteJSON(w, e); err != nil {
					return exitError{exitFinding, err}
				}
				return exitError{e.Report.ExitCode(), nil}
			}
			if err := c.show(w, e.Report, "wide"); err != nil {
				return exitError{exitFinding, err}
			}
			if err := report.WriteDetails(w, e.Details, e.DetailsError, report.Style{Colour: terminal.Colour(w)}); err != nil {
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
	return cmd
}

func probeNames() []string {
	var names []string
	for _, p := range config.Default().Probes.List() {
		names = append(names, p.Name())
	}
	return names
}

func (c *common) explainHere(ctx context.Context, name string) (explanation, error) {
	cfg, err := c.load()
	if err != nil {
		return explanation{}, err
	}
	view, closeView, err := c.open()
	if err != nil {
		return explanation{}, err
	}
	defer closeView()
	r := c.pass(ctx, view, cfg)
	r.Probes = slices.DeleteFunc(r.Probes, func(p report.ProbeReport) bool { return p.Name != name })
	settings, err := settingsOf(cfg, name)
	from := "the defaults"
	if c.config != "" {
		from = c.config
	}
	e := explanation{Report: r, Settings: settings, From: from}
	if err == nil {
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
		Use:   "validate FILE...",
		Short: "Say what is wrong with config files, each mistake with its line",
		Args:  cobra.MinimumNArgs(1),
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
