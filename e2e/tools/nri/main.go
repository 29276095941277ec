// An NRI plugin for the end-to-end tests, on the real stub. It writes every event as a line of JSON to the file in
// -log, and does what -do says: a JSON object by event name, see the type action. A launched plugin has the same as
// its configuration: one line with the log's path, one with the object.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// action is what the plugin does at an event, after the event was written.
type action struct {
	// Only for containers (or, for events of pods, pods) of this name; empty: all.
	Name string `json:"name"`
	// Only so many times; 0: always.
	Times int `json:"times"`
	// Milliseconds to wait.
	Sleep int `json:"sleep"`
	// Waits until this file is there.
	Until string `json:"until"`
	// Fails with this message.
	Fail string `json:"fail"`
	// Ends the process at once.
	Die bool `json:"die"`
	// The answer, as the fields of the interface.
	Adjust json.RawMessage `json:"adjust"`
	Update json.RawMessage `json:"update"`
	// The memory limit that the container of this name gets, of those that the plugin knows.
	Limit map[string]int64 `json:"limit"`
	// Does so by a call of its own, rather than in its answer.
	Unsolicited bool `json:"unsolicited"`
}

type plugin struct {
	mutex   sync.Mutex
	name    string
	log     string
	actions map[string]*action
	known   map[string]string
	stub    stub.Stub
}

type line struct {
	Plugin     string              `json:"plugin"`
	Event      string              `json:"event"`
	At         int64               `json:"at"`
	Pod        *api.PodSandbox     `json:"pod,omitempty"`
	Container  *api.Container      `json:"container,omitempty"`
	Pods       []string            `json:"pods,omitempty"`
	Containers []string            `json:"containers,omitempty"`
	States     map[string]string   `json:"states,omitempty"`
	Resources  *api.LinuxResources `json:"resources,omitempty"`
	Text       string              `json:"text,omitempty"`
}

func (p *plugin) write(l line) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	l.Plugin, l.At = p.name, time.Now().UnixNano()
	file, err := os.OpenFile(p.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer file.Close()
	text, err := json.Marshal(l)
	if err != nil {
		text = []byte(fmt.Sprintf(`{"event":"broken","text":%q}`, err.Error()))
	}
	if _, err := file.Write(append(text, '\n')); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// at writes the event and does what is wanted; nil: no more than that.
func (p *plugin) at(ctx context.Context, l line) (*action, error) {
	name := ""
	if l.Container != nil {
		name = l.Container.GetName()
		p.mutex.Lock()
		p.known[name] = l.Container.GetId()
		p.mutex.Unlock()
	} else if l.Pod != nil {
		name = l.Pod.GetName()
	}
	p.write(l)
	p.mutex.Lock()
	found := p.actions[l.Event]
	if found == nil || (found.Name != "" && found.Name != name) || found.Times < 0 {
		p.mutex.Unlock()
		return nil, nil
	}
	if found.Times > 0 {
		found.Times--
		if found.Times == 0 {
			found.Times = -1
		}
	}
	p.mutex.Unlock()
	if found.Die {
		os.Exit(3)
	}
	time.Sleep(time.Duration(found.Sleep) * time.Millisecond)
	for found.Until != "" {
		if _, err := os.Stat(found.Until); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	if found.Fail != "" {
		return nil, errors.New(found.Fail)
	}
	return found, nil
}

func (p *plugin) updates(a *action) ([]*api.ContainerUpdate, error) {
	if a == nil {
		return nil, nil
	}
	var list []*api.ContainerUpdate
	if len(a.Update) > 0 {
		if err := json.Unmarshal(a.Update, &list); err != nil {
			return nil, err
		}
	}
	for name, limit := range a.Limit {
		p.mutex.Lock()
		id := p.known[name]
		p.mutex.Unlock()
		update := &api.ContainerUpdate{}
		update.SetContainerId(id)
		update.SetLinuxMemoryLimit(limit)
		list = append(list, update)
	}
	if a.Unsolicited && len(list) > 0 {
		failed, err := p.stub.UpdateContainers(list)
		p.write(line{Event: "Unsolicited", Text: fmt.Sprintf("failed %d, error %v", len(failed), err)})
		return nil, nil
	}
	return list, nil
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	if config != "" {
		log, actions, _ := strings.Cut(config, "\n")
		p.log = log
		if err := p.parse(actions); err != nil {
			return 0, err
		}
	}
	p.write(line{Event: "Configure", Text: runtime + " " + version})
	return 0, nil
}

func (p *plugin) parse(text string) error {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	return json.Unmarshal([]byte(text), &p.actions)
}

func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	l := line{Event: "Synchronize", States: map[string]string{}}
	for _, pod := range pods {
		l.Pods = append(l.Pods, pod.GetId())
	}
	for _, container := range containers {
		l.Containers = append(l.Containers, container.GetId())
		l.States[container.GetId()] = container.GetState().String()
		p.mutex.Lock()
		p.known[container.GetName()] = container.GetId()
		p.mutex.Unlock()
	}
	a, err := p.at(ctx, l)
	if err != nil {
		return nil, err
	}
	updates, err := p.updates(a)
	p.write(line{Event: "Synchronized"})
	return updates, err
}

func (p *plugin) pod(ctx context.Context, event string, pod *api.PodSandbox) error {
	_, err := p.at(ctx, line{Event: event, Pod: pod})
	return err
}

func (p *plugin) container(ctx context.Context, event string, pod *api.PodSandbox, container *api.Container) error {
	a, err := p.at(ctx, line{Event: event, Pod: pod, Container: container})
	if err == nil && a != nil && a.Unsolicited {
		_, err = p.updates(a)
	}
	return err
}

func (p *plugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "RunPodSandbox", pod)
}

func (p *plugin) UpdatePodSandbox(ctx context.Context, pod *api.PodSandbox, _, resources *api.LinuxResources) error {
	_, err := p.at(ctx, line{Event: "UpdatePodSandbox", Pod: pod, Resources: resources})
	return err
}

func (p *plugin) PostUpdatePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "PostUpdatePodSandbox", pod)
}

func (p *plugin) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "StopPodSandbox", pod)
}

func (p *plugin) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.pod(ctx, "RemovePodSandbox", pod)
}

func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a, err := p.at(ctx, line{Event: "CreateContainer", Pod: pod, Container: container})
	if err != nil || a == nil {
		return nil, nil, err
	}
	adjust := &api.ContainerAdjustment{}
	if len(a.Adjust) > 0 {
		if err := json.Unmarshal(a.Adjust, adjust); err != nil {
			return nil, nil, err
		}
	}
	updates, err := p.updates(a)
	return adjust, updates, err
}

func (p *plugin) PostCreateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.container(ctx, "PostCreateContainer", pod, container)
}

func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.container(ctx, "StartContainer", pod, container)
}

func (p *plugin) PostStartContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.container(ctx, "PostStartContainer", pod, container)
}

func (p *plugin) UpdateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	a, err := p.at(ctx, line{Event: "UpdateContainer", Pod: pod, Container: container, Resources: resources})
	if err != nil {
		return nil, err
	}
	return p.updates(a)
}

func (p *plugin) PostUpdateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.container(ctx, "PostUpdateContainer", pod, container)
}

func (p *plugin) StopContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	a, err := p.at(ctx, line{Event: "StopContainer", Pod: pod, Container: container})
	if err != nil {
		return nil, err
	}
	return p.updates(a)
}

func (p *plugin) RemoveContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.container(ctx, "RemoveContainer", pod, container)
}

// validator also judges adjustments: apart, as only a plugin that is there for it should be asked.
type validator struct{ *plugin }

func (v *validator) ValidateContainerAdjustment(ctx context.Context, request *api.ValidateContainerAdjustmentRequest) error {
	var owners []string
	for _, fields := range request.GetOwners().GetOwners() {
		for _, keys := range fields.GetCompound() {
			for key, owner := range keys.GetOwners() {
				owners = append(owners, key+"="+owner)
			}
		}
	}
	l := line{Event: "ValidateContainerAdjustment", Pod: request.GetPod(), Container: request.GetContainer(), Text: strings.Join(owners, " ")}
	_, err := v.at(ctx, l)
	return err
}

func run() error {
	socket := flag.String("socket", "", "where the runtime listens")
	index := flag.String("index", "", "index of the plugin")
	name := flag.String("name", "", "name of the plugin")
	log := flag.String("log", "", "file of the events")
	do := flag.String("do", "", "what to do at events")
	validate := flag.Bool("validate", false, "judge adjustments")
	again := flag.Bool("again", false, "connect again when the connection ends")
	flag.Parse()
	p := &plugin{name: *name, log: *log, known: map[string]string{}, actions: map[string]*action{}}
	if *name == "" {
		p.name = filepath.Base(os.Args[0])
	}
	if err := p.parse(*do); err != nil {
		return err
	}
	var options []stub.Option
	if *index != "" {
		options = append(options, stub.WithPluginIdx(*index), stub.WithPluginName(*name), stub.WithSocketPath(*socket))
	}
	var handlers interface{} = p
	if *validate {
		handlers = &validator{p}
	}
	for {
		s, err := stub.New(handlers, options...)
		if err != nil {
			return err
		}
		p.stub = s
		err = s.Run(context.Background())
		if !*again {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
