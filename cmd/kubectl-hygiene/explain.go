package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/pkg/cluster"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/pkg/terminal"
)

func newExplain(c *common) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "explain NODE [PROBE]",
		Short: "Show a node's probe with all its evidence, asking the agent there",
		Long: `explain executes "/agent explain PROBE" in the pod of the agent on a node: all
the evidence and the settings in force. Without a probe it explains those that
tell of a problem or could not run.

It takes the right to create pods/exec in the agent's namespace. The agent's
pod is privileged and shares the host's process IDs: who may execute in it is
root on the node. Reading the conditions takes no such right, see "kubectl
hygiene -o wide".

Exit codes are those of "agent check": 0 nothing is wrong; 1 a finding; 2
usage, or nobody answers; 3 no finding, but a probe could not run.`,
		Example: `  kubectl hygiene explain n-time         # the probes that tell of a problem
  kubectl hygiene explain n-time oom     # this one, whatever it tells`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "text" && output != "json" {
				return exitError{exitUsage, fmt.Errorf("-o %s: want text or json", output)}
			}
			client, err := c.client()
			if err != nil {
				return err
			}
			p := c.progress(cmd, client, output, "asking the API server")
			defer p.Done()
			pod, err := c.agentOn(cmd.Context(), client, args[0])
			if err != nil {
				return exitError{exitUsage, err}
			}
			probes := args[1:]
			if len(probes) == 0 {
				if probes, err = troubled(cmd.Context(), client, args[0], pod); err != nil {
					return exitError{exitUsage, err}
				}
				if len(probes) == 0 {
					p.Done()
					fmt.Fprintf(c.out, "%s: no probe tells of a problem; name one to see its evidence\n", terminal.Line(args[0]))
					return nil
				}
			}
			worst := 0
			for i, probe := range probes {
				if i > 0 && output == "text" {
					p.Done()
					fmt.Fprintln(c.out)
				}
				p.Say("asking the agent in %s for its %s probe", pod.Name, probe)
				code, err := c.explain(cmd, client, pod, probe, output, p)
				p.Done()
				if err != nil {
					return exitError{exitUsage, err}
				}
				worst = worse(worst, code)
			}
			return exitError{worst, nil}
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			return c.completeExplain(cmd.Context(), args), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// explain runs it in the pod. A node may be hostile, so what comes from there is
// escaped like everything else.
func (c *common) explain(cmd *cobra.Command, client *cluster.Client, pod corev1.Pod, probe, output string, p *terminal.Progress) (int, error) {
	out, errOut := terminal.NewLines(p.Until(c.out)), terminal.NewLines(p.Until(cmd.ErrOrStderr()))
	const limit = 32 << 20
	code, err := client.Exec(cmd.Context(), pod, []string{"/agent", "explain", probe, "-o", output}, &atMost{out, limit}, &atMost{errOut, limit})
	return code, errors.Join(err, out.Close(), errOut.Close())
}

// atMost ends a stream that has no end.
type atMost struct {
	w    io.Writer
	left int
}

func (a *atMost) Write(p []byte) (int, error) {
	if a.left -= len(p); a.left < 0 {
		return 0, errors.New("the answer is too long")
	}
	return a.w.Write(p)
}

// worse of two exit codes: usage, then a finding, then what could not be checked.
func worse(a, b int) int {
	order := []int{0, 3, 1, 2}
	at := func(code int) int { return slices.Index(order, code) }
	if at(b) < 0 || at(b) > at(a) && at(a) >= 0 {
		return b
	}
	return a
}

// agentOn finds the pod of a node's agent.
func (c *common) agentOn(ctx context.Context, client *cluster.Client, node string) (corev1.Pod, error) {
	pods, err := client.AgentPods(ctx, c.namespace, node)
	if err != nil {
		return corev1.Pod{}, err
	}
	pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	// During a rollout with surge the one that runs is the one to ask.
	slices.SortStableFunc(pods, func(a, b corev1.Pod) int { return cmp.Compare(running(b), running(a)) })
	if len(pods) == 0 {
		return corev1.Pod{}, fmt.Errorf("no agent runs on a node %q: see kubectl get nodes, and kubectl -n %s get pods -o wide", node, c.namespace)
	}
	if running(pods[0]) == 0 {
		return corev1.Pod{}, fmt.Errorf("the agent's pod %s on %s does not run: kubectl -n %s describe pod %s", pods[0].Name, node, c.namespace, pods[0].Name)
	}
	return pods[0], nil
}

func running(p corev1.Pod) int {
	if p.Status.Phase == corev1.PodRunning {
		return 1
	}
	return 0
}

// troubled are the probes of a node that have something to explain.
func troubled(ctx context.Context, client *cluster.Client, node string, pod corev1.Pod) ([]string, error) {
	n, err := client.Node(ctx, node)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range fleet.NewReport([]corev1.Node{n}, []corev1.Pod{pod}, time.Now()).Nodes[0].Probes {
		if p.Status != finding.OK {
			out = append(out, p.Probe)
		}
	}
	return out, nil
}

// completeExplain offers the nodes, and then the probes that have told something
// of the one chosen.
func (c *common) completeExplain(ctx context.Context, args []string) []string {
	ctx, cancel := context.WithTimeout(ctx, quiet)
	defer cancel()
	client, err := c.client()
	if err != nil || len(args) > 1 {
		return nil
	}
	var out []string
	if len(args) == 0 {
		nodes, err := client.Nodes(ctx, "")
		if err != nil {
			return nil
		}
		for _, n := range nodes {
			out = append(out, n.Name)
		}
		return out
	}
	n, err := client.Node(ctx, args[0])
	if err != nil {
		return nil
	}
	for _, p := range fleet.NewReport([]corev1.Node{n}, nil, time.Now()).Nodes[0].Probes {
		status := strings.ToLower(string(p.Status))
		if p.Status == finding.Problem {
			status = p.Reason
		}
		out = append(out, p.Probe+"\t"+terminal.Line(status))
	}
	return out
}
