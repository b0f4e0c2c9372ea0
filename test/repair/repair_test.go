//go:build cluster

package repair

import (
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

//go:embed testdata
var testdata embed.FS

func text(t *testing.T, name string) string {
	t.Helper()
	data, err := testdata.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

const (
	// profileFile is the profile's own file; modulesFile and sysctlFile are the
	// agent's.
	profileFile = "/etc/multipath/conf.d/60-host-hygiene-gluster-block.conf"
	modulesFile = "/etc/modules-load.d/host-hygiene.conf"
	sysctlFile  = "/etc/sysctl.d/90-host-hygiene.conf"

	agentPlan = guestAgent + " plan --config /run/repair/config.yaml"
)

// TestRepair is one story, for each chapter needs what the one before has done:
// a node without the packages of gluster-block, planned for, held back, mended,
// asked for what can not be had, and put back.
func TestRepair(t *testing.T) {
	if os.Getenv("HYGIENE_NIGHTLY") == "" && os.Getenv("HYGIENE_ATTACH") == "" {
		t.Skip("it takes a second machine and several minutes: make nightly")
	}
	w := start(t)
	w.remove(t) // what an earlier run left on an attached cluster
	w.Guest(t, text(t, "restore.sh"))
	w.buildAgent(t)
	t.Cleanup(func() {
		w.remove(t)
		w.Guest(t, text(t, "restore.sh"))
	})
	rigtest.OnFailure(t, w.dump)
	w.Guest(t, text(t, "strip.sh"))
	w.Spent("node stripped of its storage packages")

	for _, chapter := range []struct {
		name string
		play func(*testing.T)
	}{
		{"plan", w.plan},
		{"held back", w.heldBack},
		{"killed", w.killed},
		{"mended", w.mended},
		{"faulty", w.faulty},
		{"rollback", w.rollback},
	} {
		t.Run(chapter.name, chapter.play)
		w.Spent(chapter.name)
	}
}

// fingerprint is what can be seen of every file on the node, by file and aspect.
func (w *world) fingerprint(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	for line := range strings.Lines(w.Guest(t, text(t, "fingerprint.sh"))) {
		what, seen, _ := strings.Cut(strings.TrimSpace(line), "\t")
		files[what] = seen
	}
	return files
}

// differences are the aspects that are not the same in both.
func differences(before, after map[string]string) []string {
	var all []string
	for what, was := range before {
		if is, there := after[what]; !there {
			all = append(all, what+" is gone")
		} else if is != was {
			all = append(all, fmt.Sprintf("%s: %s became %s", what, was, is))
		}
	}
	for what := range after {
		if _, there := before[what]; !there {
			all = append(all, what+" is new")
		}
	}
	slices.Sort(all)
	return all
}

// planned is what agent plan says on the node.
func (w *world) planned(t *testing.T) (steps []plannedStep) {
	t.Helper()
	var plan struct{ Steps []plannedStep }
	out := w.Guest(t, agentPlan+" -o json")
	if err := json.Unmarshal([]byte(out), &plan); err != nil {
		t.Fatalf("agent plan -o json: %v\n%s", err, out)
	}
	return plan.Steps
}

type plannedStep struct {
	ID, Refused string
	Subjects    []string
}

// plan: it is told what would be done, by the daemon and by hand, and no file on
// the node is another afterwards.
func (w *world) plan(t *testing.T) {
	before := w.fingerprint(t)
	if len(before) < 500 {
		t.Fatalf("only %d aspects of files were seen", len(before))
	}
	w.Kubectl(t, "apply", "-k", overlay)
	w.writeConfig(t, text(t, "config.yaml"))
	w.PodReady(t, 0)
	w.Await(t, "PackageMissing", w.is(t, "PackageProblem", corev1.ConditionTrue, "PackageMissing"))
	w.logged(t, "remedy planned", "step=packages")
	w.logged(t, "remedy planned", "step=module-dm_multipath")
	told := w.Guest(t, agentPlan+" --simulate")
	for _, want := range []string{
		"apt-get install --yes --no-install-recommends --no-upgrade --no-remove", "-- hygiene-slow multipath-tools open-iscsi",
		"apt-get update", "dry run: would install",
		"+++ " + profileFile, `+    product "TCMU device"`, "+++ " + modulesFile, "+dm_multipath",
		"modprobe -- iscsi_tcp", "why   PackageMissing: ",
	} {
		if !strings.Contains(told, want) {
			t.Errorf("agent plan does not say %q:\n%s", want, told)
		}
	}
	if d := differences(before, w.fingerprint(t)); len(d) > 0 {
		t.Errorf("planning has changed the node:\n%s", strings.Join(d, "\n"))
	}
	if l, err := w.slot(t.Context()); err != nil || l != nil {
		t.Errorf("planning took a slot: %+v, %v", l, err)
	}
	if got := w.events(t, "RemedyStarted"); len(got) > 0 {
		t.Errorf("planning began something: %q", got)
	}
}

// heldBack: enforce has the node repaired, but not while another holds the
// fleet's only slot.
func (w *world) heldBack(t *testing.T) {
	before := w.fingerprint(t)
	w.holdSlot(t, "another-node")
	w.configure(t, strings.Replace(text(t, "config.yaml"), "mode: plan", "mode: enforce", 1))
	w.logged(t, "remedies wait", "another-node (host-hygiene-slot-0)")
	time.Sleep(10 * time.Second)
	if d := differences(before, w.fingerprint(t)); len(d) > 0 {
		t.Errorf("the node was changed while another held the slot:\n%s", strings.Join(d, "\n"))
	}
	if got := w.events(t, "RemedyStarted"); len(got) > 0 {
		t.Errorf("something was begun while another held the slot: %q", got)
	}
	freed := time.Now()
	w.holdSlot(t, "")
	w.Await(t, "the slot to be taken", func() error {
		l, err := w.slot(t.Context())
		if err == nil && holder(l) != w.Node.Name() {
			err = fmt.Errorf("the holder is %q", holder(l))
		}
		return err
	})
	w.Spent(fmt.Sprintf("the slot was taken %s after it was freed", time.Since(freed).Round(100*time.Millisecond)))
}

// killed: the agent is killed while apt works, which goes on outside of its pod;
// the next agent finds it, waits for it and does not begin anew.
func (w *world) killed(t *testing.T) {
	w.Await(t, "hygiene-slow to be half-way", func() error {
		if w.Guest(t, "test ! -e /run/repair/waiting || echo yes") != "yes" {
			return errors.New("its script does not run yet")
		}
		return nil
	})
	if got := w.Guest(t, "systemctl show -P ControlGroup host-hygiene-packages.service"); got != "/system.slice/host-hygiene-packages.service" {
		t.Errorf("apt works in the control group %q", got)
	}
	l, err := w.slot(t.Context())
	if err != nil || holder(l) != w.Node.Name() || *l.Spec.LeaseDurationSeconds < 45*60 {
		t.Errorf("the slot does not cover the installation: %+v, %v", l, err)
	}
	apt := w.Guest(t, "systemctl show -P MainPID host-hygiene-packages.service")
	w.Guest(t, rigtest.AgentPID+"kill -9 $pid")
	w.PodReady(t, 1)
	w.logged(t, "following a job that was begun before", "job=host-hygiene-packages", "running=true")
	if now := w.Guest(t, "systemctl show -P MainPID host-hygiene-packages.service"); now != apt {
		t.Errorf("apt was process %s and is %s", apt, now)
	}
	if l, err := w.slot(t.Context()); err != nil || holder(l) != w.Node.Name() {
		t.Errorf("the slot was given away while apt works: held by %q, %v", holder(l), err)
	}
	w.Guest(t, "touch /run/repair/go-on")
	w.awaitEvent(t, "RemedyApplied", "multipath-tools")
	if n := w.Guest(t, "grep -c '^Commandline: .* install .*hygiene-slow' /var/log/apt/history.log"); n != "1" {
		t.Errorf("apt has installed %s times:\n%s", n, w.Guest(t, "cat /var/log/apt/history.log"))
	}
	if bad := w.Guest(t, "dpkg --audit"); bad != "" {
		t.Errorf("dpkg is not well: %s", bad)
	}
}

// vendorSettings are what multipathd has in force for the profile's devices.
func (w *world) vendorSettings(t *testing.T) string {
	t.Helper()
	return w.Guest(t, `multipathd show config | awk '/^defaults/ {d=1} d && /find_multipaths/ {print} /^}/ {d=0}
/^\tdevice \{/ {b=""; in_=1} in_ {b=b $0 "\n"} in_ && /^\t}/ {if (b ~ /product "\^?TCMU device/) last=b; in_=0} END {printf "%s", last}'`)
}

// mended: nothing is wrong any more, multipathd has the vendor's settings, and
// there is nothing left to plan.
func (w *world) mended(t *testing.T) {
	w.Await(t, "every condition to be healthy", w.healthy(t))
	w.awaitEvent(t, "RemedyStarted", "multipath-tools")
	w.awaitEvent(t, "RemedyConfirmed", "multipath-tools")
	w.Guest(t, `dpkg-query -W -f '${db:Status-Status}\n' multipath-tools open-iscsi hygiene-slow | grep -vx installed && exit 1
grep -q '^dm_multipath ' /proc/modules; grep -q '^iscsi_tcp ' /proc/modules
grep -qx iscsi_tcp `+modulesFile+`
systemctl is-active -q multipathd.service iscsid.socket; systemctl is-enabled -q multipathd.service iscsid.socket
grep -q '^InitiatorName=iqn' /etc/iscsi/initiatorname.iscsi`)
	settings := strings.Join(strings.Fields(w.vendorSettings(t)), " ")
	for _, want := range []string{
		`find_multipaths "on"`, // as multipathd spells yes
		`no_path_retry 120`, `path_grouping_policy "failover"`, `path_selector "round-robin 0"`,
		`hardware_handler "1 alua"`, `prio "alua"`, `path_checker "tur"`, `failback "immediate"`, `user_friendly_names "yes"`,
	} {
		if !strings.Contains(settings, want) && !strings.Contains(strings.ReplaceAll(settings, `"`, ""), strings.ReplaceAll(want, `"`, "")) {
			t.Errorf("multipathd does not have %s in force: %s", want, settings)
		}
	}
	if steps := w.planned(t); len(steps) > 0 {
		t.Errorf("there is still something to plan: %+v", steps)
	}
	w.Await(t, "the slot to be given back", func() error {
		l, err := w.slot(t.Context())
		if err == nil && holder(l) != "" {
			err = fmt.Errorf("it is held by %q", holder(l))
		}
		return err
	})
	if bad := w.events(t, "RemedyFailed"); len(bad) > 0 {
		t.Errorf("something failed on the way: %q", bad)
	}
}

// faulty: what is wrong in the config is refused or taken back, and said in the
// words of the program that refused it; the rest is done; nothing is tried again
// and again.
func (w *world) faulty(t *testing.T) {
	const running = "multipathd show config; ls -l --time-style=full-iso /etc/multipath/conf.d; sha256sum /etc/multipath/conf.d/*"
	before := w.Guest(t, running)
	users := w.Guest(t, "cat /proc/sys/fs/inotify/max_user_instances")
	w.configure(t, text(t, "faulty.yaml"))
	failed := w.awaitEvent(t, "RemedyFailed", "hygiene-no-such")
	if !strings.Contains(failed, "Unable to locate package hygiene-no-such") {
		t.Errorf("the Event does not have apt's own words: %s", failed)
	}
	failed = w.awaitEvent(t, "RemedyFailed", "71-repair-unknown.conf")
	if !strings.Contains(failed, "hygiene_no_such_keyword") {
		t.Errorf("the Event does not have multipath's own words: %s", failed)
	}
	w.awaitEvent(t, "RemedyConfirmed", "fs.inotify.max_user_instances")
	w.awaitEvent(t, "RemedyConfirmed", "dummy")
	w.Guest(t, `test $(cat /proc/sys/fs/inotify/max_user_instances) = 8192
grep -qx 'fs.inotify.max_user_instances = 8192' `+sysctlFile+`; grep -q '^dummy ' /proc/modules; grep -qx dummy `+modulesFile)
	if users == "8192" {
		t.Error("the kernel setting was what it should become, so that it proves nothing")
	}
	if after := w.Guest(t, running); after != before {
		t.Errorf("multipathd's settings or files are not what they were:\n%s\nand now\n%s", before, after)
	}
	w.Await(t, "FileMissing", w.is(t, "ServiceProblem", corev1.ConditionTrue, "FileMissing"))
	w.Await(t, "PackageMissing", w.is(t, "PackageProblem", corev1.ConditionTrue, "PackageMissing"))
	w.Await(t, "Ready to name what failed", func() error {
		all, err := w.conditions(t.Context())
		if err == nil && !strings.Contains(all["Ready"].Message, "failed at") {
			err = fmt.Errorf("it says %q", all["Ready"].Message)
		}
		return err
	})

	w.Await(t, "the finding to have apt's own last lines", func() error {
		told := w.Guest(t, guestAgent+" explain packages || true")
		if !strings.Contains(told, "its remedy failed: ") || strings.Count(told, "E: Unable to locate package hygiene-no-such") < 2 {
			return fmt.Errorf("agent explain says\n%s", told)
		}
		return nil
	})

	started := w.events(t, "RemedyStarted")
	time.Sleep(20 * time.Second) // four passes
	if again := w.events(t, "RemedyStarted"); len(again) != len(started) {
		t.Errorf("something was tried again within its cooldown: %q, before %q", again, started)
	}
	refused := map[string]string{}
	for _, s := range w.planned(t) {
		if s.Refused == "" {
			t.Errorf("%s would be done again: %v", s.ID, s.Subjects)
		}
		refused[strings.Join(s.Subjects, " ")] = s.Refused
	}
	for subject, why := range map[string]string{
		"/etc/multipath/conf.d/70-repair-unclosed.conf": "the section defaults is not closed",
		"/etc/multipath/conf.d/71-repair-unknown.conf":  "is not tried again before",
		"hygiene-no-such": "is not tried again before",
	} {
		if !strings.Contains(refused[subject], why) {
			t.Errorf("%s is refused with %q, want %q", subject, refused[subject], why)
		}
	}
}

// rollback: everything but packages and modules is what it was.
func (w *world) rollback(t *testing.T) {
	w.configure(t, strings.Replace(text(t, "config.yaml"), "storageProfiles: [gluster-block]\nrequire:\n  packages: [{name: hygiene-slow}]\n", "", 1))
	told := w.Guest(t, guestAgent+" rollback --all")
	for _, want := range []string{profileFile + " is gone", modulesFile + " is gone", sysctlFile + " is gone",
		"fs.inotify.max_user_instances is ", "apt-get remove", "the module dummy stays loaded"} {
		if !strings.Contains(told, want) {
			t.Errorf("agent rollback --all does not say %q:\n%s", want, told)
		}
	}
	w.Guest(t, `for f in `+profileFile+` `+modulesFile+` `+sysctlFile+`; do test ! -e $f; done
test $(cat /proc/sys/fs/inotify/max_user_instances) != 8192
systemctl is-active -q multipathd.service`)
	if s := w.vendorSettings(t); strings.Contains(s, "no_path_retry 120") || strings.Contains(s, `no_path_retry "120"`) {
		t.Errorf("multipathd still has the settings that were taken back: %s", s)
	}
	if again := w.Guest(t, guestAgent+" rollback --all"); again != "Nothing to take back." {
		t.Errorf("a second rollback says %q", again)
	}
}
